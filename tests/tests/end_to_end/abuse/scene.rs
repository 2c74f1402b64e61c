//! A daemon with rules, and what has to hold whatever clients do.

use std::time::Duration;

use anyhow::{Result, ensure};
use portfwd_tests::control::{Answer, Raw};
use portfwd_tests::daemon::{Daemon, DaemonOptions, Mode};
use portfwd_tests::{Lab, LabOptions};

/// How long the daemon may keep a connection at most, and what a busy machine needs beside.
pub const LIFETIME: Duration = Duration::from_secs(30 + 30);
/// What abuse may cost the daemon, in bytes.
const COST: u64 = 96 << 20;

/// A daemon that is abused. The daemon goes first.
pub struct Scene {
    pub daemon: Daemon,
    _lab: Lab,
    before: u64,
}

impl Scene {
    /// A daemon with `rules` rules.
    pub fn new(rules: u16) -> Result<Self> {
        let lab = LabOptions::default().build()?;
        let options = DaemonOptions {
            log_at_end: rules < 100,
            ..DaemonOptions::new(Mode::Tc)
        };
        let daemon = options.start(&lab.gateway)?;
        let mut scene = Self {
            daemon,
            _lab: lab,
            before: 0,
        };
        for number in 0..rules {
            let rule = format!(
                r#"{{"proto":"udp","listen":"{}","target":"10.2.0.2:53"}}"#,
                10_000 + number
            );
            let answer = scene.ask(&post(&rule))?;
            ensure!(answer.status == 201, "{}", answer.text());
        }
        scene.before = scene.daemon.memory()?.now;
        Ok(scene)
    }

    /// A new connection.
    pub fn connect(&self) -> Result<Raw> {
        Raw::connect(&self.daemon.socket())
    }

    /// Says something on a connection of its own, and what is answered.
    pub fn ask(&self, request: &str) -> Result<Answer> {
        let mut connection = self.connect()?;
        connection.say(request.as_bytes())?;
        connection.answer(LIFETIME)
    }

    /// Fails if the daemon does not serve an honest client, or has taken too much memory at any time since the start.
    pub fn expect_served_in_bounds(&self) -> Result<()> {
        self.daemon.ok(&["status"])?;
        self.expect_bounds()
    }

    /// Fails if the daemon has taken too much memory at any time since the start.
    pub fn expect_bounds(&self) -> Result<()> {
        let peak = self.daemon.memory()?.peak;
        ensure!(
            peak < self.before + COST,
            "the daemon took {peak} bytes, {} before",
            self.before
        );
        Ok(())
    }
}

/// `GET path`, the only request of its connection.
pub fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
}

/// `POST /v1/rules` with a body.
pub fn post(body: &str) -> String {
    let length = body.len();
    format!(
        "POST /v1/rules HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}
