//! `portfwd detach` leaves nothing.

use std::collections::BTreeSet;

use anyhow::Result;
use aya::programs::{SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use portfwd_tests::daemon::{Daemon, Mode};
use portfwd_tests::foreign_xdp::attached_id;
use portfwd_tests::process::run_for_text;
use portfwd_tests::{Family, Lab, udp};
use rstest::rstest;

use crate::scene::{Scene, TARGET, listen};

/// The first kernel with TCX ("bpf: Add fd-based tcx multi-prog infra with link support"). Those before have filters alone.
const TCX: KernelVersion = KernelVersion::new(6, 6, 0);

/// Every program on the gateway's interfaces, as text.
fn attached(lab: &Lab) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for end in [lab.wan_end(), lab.lan_end()] {
        let interface = end.interface;
        if let Some(id) = attached_id(end)? {
            found.insert(format!("{interface} xdp {id}"));
        }
        for (hook, attach_type) in [
            ("ingress", TcAttachType::Ingress),
            ("egress", TcAttachType::Egress),
        ] {
            if KernelVersion::current()? >= TCX {
                let (_, programs) = lab
                    .gateway
                    .run(|| SchedClassifier::query_tcx(interface, attach_type))??;
                for program in programs {
                    found.insert(format!("{interface} tcx {hook} {}", program.id()));
                }
            }
            let filters = run_for_text(
                lab.gateway
                    .command("tc")?
                    .args(["filter", "show", "dev", interface, hook]),
            )?;
            found.extend(filters.lines().map(|line| format!("{interface} {line}")));
        }
    }
    Ok(found)
}

#[rstest]
#[case::after_native_xdp(Mode::Xdp)]
#[case::after_generic_xdp(Mode::XdpGeneric)]
#[case::after_tc(Mode::Tc)]
fn detach_takes_every_program_pin_and_socket(#[case] mode: Mode) -> Result<()> {
    let lab = Lab::for_mode(mode)?;
    assert_eq!(attached(&lab)?, BTreeSet::new());
    let mut daemon = Daemon::start_in(&lab.gateway, mode)?;
    assert!(!attached(&lab)?.is_empty());
    assert!(daemon.pins().exists());
    assert!(daemon.socket().exists());
    daemon.kill9()?;
    assert!(
        !attached(&lab)?.is_empty(),
        "it must not go with the daemon"
    );
    daemon.ok(&["detach"])?;
    assert_eq!(attached(&lab)?, BTreeSet::new());
    assert!(!daemon.pins().exists());
    assert!(!daemon.socket().exists());
    Ok(())
}

#[test]
fn nothing_is_forwarded_after_detach() -> Result<()> {
    let mut scene = Scene::forwarding(Mode::Xdp, "udp")?;
    let _echo = udp::Echo::start(&scene.lab.server, Family::V4, TARGET)?;
    let socket = udp::connect(&scene.lab.client, listen(Family::V4))?;
    udp::exchange(&socket, b"forwarded")?;
    scene.daemon.kill9()?;
    udp::exchange(&socket, b"forwarded without a daemon")?;
    scene.daemon.ok(&["detach"])?;
    assert!(udp::exchange(&socket, b"not forwarded").is_err());
    Ok(())
}

#[test]
fn a_daemon_starts_afresh_after_detach() -> Result<()> {
    let mut scene = Scene::forwarding(Mode::Xdp, "udp")?;
    scene.daemon.kill9()?;
    scene.daemon.ok(&["detach"])?;
    scene.daemon.start()?;
    assert!(scene.daemon.rules()?.is_empty());
    assert!(scene.daemon.flows()?.is_empty());
    Ok(())
}
