//! What can happen to a gateway, with every kind of traffic going on. `cargo xtask soak chaos` has the whole matrix in each mode.

use anyhow::Result;
use portfwd_tests::Family;
use portfwd_tests::chaos::{Disturbance, run};
use portfwd_tests::daemon::Mode;
use rstest::rstest;

#[rstest]
#[case::a_restart(Mode::Tc, Family::V4, Disturbance::Restart)]
#[case::an_upgrade(Mode::Xdp, Family::V6, Disturbance::Upgrade)]
#[case::a_swap_of_all_rules(Mode::Xdp, Family::V4, Disturbance::RuleSwap)]
#[case::a_change_of_the_wans_address(Mode::Tc, Family::V6, Disturbance::WanChange)]
#[case::another_address_of_the_wan(Mode::Tc, Family::V4, Disturbance::WanMove)]
#[case::another_address_of_the_wan_over_ipv6_and_xdp(Mode::Xdp, Family::V6, Disturbance::WanMove)]
#[case::a_link_that_flaps(Mode::Xdp, Family::V4, Disturbance::LinkFlap)]
#[case::neighbours_that_are_forgotten(Mode::Tc, Family::V6, Disturbance::NeighbourFlush)]
#[case::sweeps(Mode::Tc, Family::V4, Disturbance::Sweep)]
#[case::a_full_table(Mode::Xdp, Family::V6, Disturbance::TableFull)]
fn what_traffic_of_every_kind_loses_is_bounded(
    #[case] mode: Mode,
    #[case] family: Family,
    #[case] disturbance: Disturbance,
) -> Result<()> {
    let row = run(mode, family, disturbance)?;
    println!("{row}");
    row.expect_bounded()
}
