//! A short one of what `cargo xtask soak restarts` does a thousand times.

use anyhow::Result;
use portfwd_tests::daemon::Mode;
use portfwd_tests::soak::Soak;
use rstest::rstest;

#[rstest]
#[case::over_native_xdp(Mode::Xdp)]
#[case::over_tc(Mode::Tc)]
fn starting_again_and_again_under_load_loses_nothing_and_leaves_nothing(
    #[case] mode: Mode,
) -> Result<()> {
    let mut soak = Soak::start(mode, 500, &[])?;
    for _ in 0..6 {
        soak.again()?;
    }
    let report = soak.finish()?;
    assert_eq!(report.starts, 6);
    eprintln!("{}", report.possessions.1);
    Ok(())
}
