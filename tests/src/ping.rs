//! ping, and what it heard.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};

use crate::namespace::Namespace;
use crate::process::output_within;
use crate::{Family, deadline::PATIENCE};

/// What is asked, and how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ping {
    /// Who is asked.
    pub destination: IpAddr,
    /// How often.
    pub count: u32,
    /// Bytes behind the ICMP header.
    pub size: u32,
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// From whom.
    pub from: IpAddr,
    /// TTL or hop limit that it came with.
    pub hop_limit: u8,
}

impl Ping {
    /// Five small requests.
    pub const fn to(destination: IpAddr) -> Self {
        Self {
            destination,
            count: 5,
            size: 56,
        }
    }

    /// The same with larger requests.
    #[must_use]
    pub const fn of_size(self, size: u32) -> Self {
        Self { size, ..self }
    }

    /// Asks from `namespace`; what was answered is the same, byte by byte, as what was asked.
    pub fn from(self, namespace: &Namespace) -> Result<Vec<Answer>> {
        let text = self.run(namespace)?;
        ensure!(!text.contains("wrong data byte"), "{text}");
        text.lines().filter_map(answer).collect()
    }

    /// What ping writes, whether anybody answers or not.
    pub fn run(self, namespace: &Namespace) -> Result<String> {
        let mut command = namespace.command("ping")?;
        command.arg(match Family::of(self.destination) {
            Family::V4 => "-4",
            Family::V6 => "-6",
        });
        command.args(["-n", "-i", "0.01", "-W", "2"]);
        command.args(["-c", &self.count.to_string()]);
        command.args(["-s", &self.size.to_string()]);
        command.arg(self.destination.to_string());
        let output = output_within(&mut command, PATIENCE)?;
        String::from_utf8(output.stdout).context("ping writes text")
    }
}

/// `64 bytes from 203.0.113.1: icmp_seq=1 ttl=63 time=0.1 ms`
fn answer(line: &str) -> Option<Result<Answer>> {
    let (_, line) = line.split_once(" bytes from ")?;
    let (from, rest) = line.split_once(": ")?;
    let hop_limit = rest
        .split_whitespace()
        .find_map(|word| word.strip_prefix("ttl="))?;
    let read = || {
        Ok(Answer {
            from: from.parse().context("who answers ping")?,
            hop_limit: hop_limit.parse().context("ping's TTL")?,
        })
    };
    Some(read())
}
