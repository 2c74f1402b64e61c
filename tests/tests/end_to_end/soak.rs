//! A short one of what `cargo xtask soak restarts` does a thousand times, and `cargo xtask soak upgrades` a hundred times.

use anyhow::Result;
use portfwd_tests::daemon::{Mode, binary};
use portfwd_tests::other_build::OtherBuild;
use portfwd_tests::soak::Soak;
use rstest::rstest;

#[rstest]
#[case::over_native_xdp_by_two_builds(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn starting_again_and_again_under_load_loses_nothing_and_leaves_nothing(
    #[case] mode: Mode,
) -> Result<()> {
    let (own, other) = (binary()?, OtherBuild::new()?);
    let builds = [own.as_path(), other.path()];
    let builds = match mode {
        Mode::Tc => &[][..],
        Mode::Xdp | Mode::XdpGeneric | Mode::Auto => &builds,
    };
    let mut soak = Soak::start(mode, 500, builds)?;
    for _ in 0..6 {
        soak.again()?;
    }
    let report = soak.finish()?;
    assert_eq!(report.starts, 6);
    eprintln!("{}", report.possessions.1);
    Ok(())
}
