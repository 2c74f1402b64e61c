//! A configuration that is taken back unless somebody confirms it.

use std::time::{Duration, Instant};

use anyhow::Result;
use portfwd_tests::address::GATEWAY_WAN;
use portfwd_tests::daemon::Mode;
use portfwd_tests::deadline::{PATIENCE, here, wait_until};
use portfwd_tests::{Family, tcp};

use crate::configuration::{Files, rule, targets};
use crate::scene::Scene;

const OLD: &str = "10.2.0.2:81";
const NEW: &str = "10.2.0.2:82";
/// The shortest time that a change can wait for.
const SOON: Duration = Duration::from_secs(1);

/// A gateway whose rules are those of `old`, and a file with others.
struct Trial {
    scene: Scene,
    files: Files,
    path: String,
}

impl Trial {
    fn new() -> Result<Self> {
        let scene = Scene::new(Mode::Xdp)?;
        let files = Files::new()?;
        let old = rule(&format!("web tcp 8080 {OLD}"), "") + &rule("old udp 53 10.2.0.2", "");
        let path = files.write(&old)?;
        scene.daemon.ok(&["apply", &path])?;
        files.write(
            &(rule(&format!("web tcp 8080 {NEW}"), "") + &rule("new udp 54 10.2.0.2", "")),
        )?;
        Ok(Self { scene, files, path })
    }

    /// Changes that are taken back after so long.
    fn apply(&self, confirm: Duration) -> Result<()> {
        let seconds = format!("{}s", confirm.as_secs());
        self.scene
            .daemon
            .ok(&["apply", &self.path, "--confirm", &seconds])?;
        self.expect(NEW)
    }

    fn expect(&self, web: &str) -> Result<()> {
        let other = if web == OLD { "old" } else { "new" };
        let targets = targets(&self.scene.daemon)?;
        assert_eq!(targets.keys().collect::<Vec<_>>(), [other, "web"]);
        assert_eq!(targets["web"], web);
        Ok(())
    }

    fn wait_for_old(&self) -> Result<()> {
        wait_until("the old rules to be back", PATIENCE, || {
            Ok(targets(&self.scene.daemon)?["web"] == OLD)
        })?;
        self.expect(OLD)
    }
}

#[test]
fn what_nobody_confirms_is_taken_back_and_what_is_confirmed_stays() -> Result<()> {
    let trial = Trial::new()?;
    let daemon = &trial.scene.daemon;
    let ids: Vec<_> = daemon.rules()?.iter().map(|rule| rule.id).collect();
    let _old = tcp::Echo::start(&trial.scene.lab.server, Family::V4, 81)?;
    let endpoint = GATEWAY_WAN.endpoint(Family::V4, 8080);
    let mut connection = tcp::connect(&trial.scene.lab.client, endpoint)?;
    tcp::exchange(&mut connection, b"before")?;
    trial.apply(here(SOON))?;
    tcp::exchange(&mut connection, b"meanwhile")?;
    // Changes by hand would be lost with the rollback.
    for command in [
        &["add", "tcp", "9000", "10.2.0.2"][..],
        &["remove", "web"],
        &["replace", "web", "tcp", "9000", "10.2.0.2"],
        &["apply", &trial.path],
    ] {
        let output = daemon.cli(command)?;
        assert_eq!(output.status.code(), Some(6), "{command:?}");
    }
    trial.wait_for_old()?;
    assert_eq!(
        daemon
            .rules()?
            .iter()
            .map(|rule| rule.id)
            .collect::<Vec<_>>(),
        ids
    );
    // The connection that drained meanwhile is the rule's own again.
    tcp::exchange(&mut connection, b"after")?;
    let web = daemon.rule("web")?;
    assert_eq!((web.flows, web.draining), (1, 0));
    assert_eq!(daemon.cli(&["confirm"])?.status.code(), Some(5));

    let began = Instant::now();
    trial.apply(here(2 * SOON))?;
    daemon.ok(&["confirm"])?;
    wait_until("the time to be over", PATIENCE, || {
        Ok(began.elapsed() > here(3 * SOON))
    })?;
    trial.expect(NEW)?;
    daemon.add("by-hand", "tcp", "9000", "10.2.0.2")?;
    Ok(())
}

#[test]
fn what_waits_is_taken_back_by_hand() -> Result<()> {
    let trial = Trial::new()?;
    trial.apply(Duration::from_secs(600))?;
    trial.scene.daemon.ok(&["rollback"])?;
    trial.expect(OLD)?;
    assert_eq!(
        trial.scene.daemon.cli(&["rollback"])?.status.code(),
        Some(5)
    );
    Ok(())
}

#[test]
fn a_daemon_that_is_killed_meanwhile_takes_back_all_the_same() -> Result<()> {
    let mut trial = Trial::new()?;
    // It is back before the time is over.
    trial.apply(here(2 * SOON))?;
    trial.scene.daemon.kill9()?;
    trial.scene.daemon.start()?;
    trial.wait_for_old()?;
    // It is back after that.
    let began = Instant::now();
    trial.apply(here(SOON))?;
    trial.scene.daemon.kill9()?;
    wait_until("the time to be over", PATIENCE, || {
        Ok(began.elapsed() > here(2 * SOON))
    })?;
    trial.scene.daemon.start()?;
    trial.expect(OLD)?;
    // What is confirmed stays, whoever is killed.
    trial.apply(here(SOON))?;
    trial.scene.daemon.ok(&["confirm"])?;
    trial.scene.daemon.kill9()?;
    trial.scene.daemon.start()?;
    trial.expect(NEW)?;
    drop(trial.files);
    Ok(())
}
