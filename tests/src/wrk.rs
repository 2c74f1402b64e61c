//! Small HTTP requests with wrk.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::deadline::PATIENCE;
use crate::namespace::Namespace;
use crate::process::Process;

/// How requests share connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connections {
    /// Each client keeps one.
    Kept,
    /// One for every request.
    New,
}

/// What a run saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    /// Requests that were answered, by second.
    pub requests_per_second: f64,
    /// Time that half of the answers took at most, microseconds.
    pub median_us: f64,
    /// Time that 99 of 100 took at most, microseconds.
    pub p99_us: f64,
}

/// So many clients at once.
const CLIENTS: &str = "32";

/// Asks for `url` from inside `namespace`, for `duration` (whole seconds).
///
/// # Errors
/// If wrk fails, or reports an error of a socket or of the server.
pub fn run(
    namespace: &Namespace,
    url: &str,
    connections: Connections,
    duration: Duration,
) -> Result<Report> {
    let mut command = namespace.command("wrk")?;
    command
        .args(["--threads", "1", "--connections", CLIENTS, "--latency"])
        .args(["--duration", &format!("{}s", duration.as_secs())]);
    match connections {
        Connections::Kept => {}
        Connections::New => {
            command.args(["--header", "Connection: close"]);
        }
    }
    command.arg(url);
    let mut process = Process::spawn(command)?;
    let status = process.wait(duration + PATIENCE)?;
    let text = process.output();
    if !status.success() {
        bail!("wrk failed ({status}): {text}");
    }
    parse(&text)
}

fn parse(text: &str) -> Result<Report> {
    for trouble in ["Socket errors", "Non-2xx"] {
        ensure!(!text.contains(trouble), "wrk saw trouble: {text}");
    }
    let value = |name: &str| {
        text.lines()
            .find_map(|line| line.trim().strip_prefix(name))
            .map(str::trim)
            .with_context(|| format!("wrk did not say {name}: {text}"))
    };
    Ok(Report {
        requests_per_second: value("Requests/sec:")?.parse()?,
        median_us: microseconds(value("50%")?)?,
        p99_us: microseconds(value("99%")?)?,
    })
}

/// A time like `254.00us`, `1.27ms` or `1.00s`.
fn microseconds(text: &str) -> Result<f64> {
    let (number, scale) = if let Some(number) = text.strip_suffix("us") {
        (number, 1.0)
    } else if let Some(number) = text.strip_suffix("ms") {
        (number, 1e3)
    } else if let Some(number) = text.strip_suffix('s') {
        (number, 1e6)
    } else {
        bail!("{text} is no time");
    };
    Ok(number.parse::<f64>()? * scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "Running 2s test @ http://10.1.0.1:8080/
  1 threads and 32 connections
  Latency Distribution
     50%  254.00us
     75%  301.00us
     90%    0.90ms
     99%    1.27ms
  18950 requests in 2.00s, 2.00MB read
Requests/sec:   9475.12
Transfer/sec:      1.00MB
";

    #[test]
    fn rate_and_latency_are_read() {
        let report = parse(OUTPUT).unwrap();
        assert_eq!(
            report,
            Report {
                requests_per_second: 9475.12,
                median_us: 254.0,
                p99_us: 1270.0
            }
        );
    }

    #[test]
    fn a_run_with_errors_is_none() {
        let text = OUTPUT.replace(
            "Requests/sec",
            "  Socket errors: connect 0, read 3, write 0, timeout 0\nRequests/sec",
        );
        assert!(parse(&text).is_err());
    }
}
