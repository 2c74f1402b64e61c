//! Downloads with curl, as a user makes them.

use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::namespace::Namespace;
use crate::process::{run, run_for_text};

/// The `http://` address of `path` at an endpoint.
pub fn url(endpoint: SocketAddr, path: &str) -> String {
    format!("http://{endpoint}/{path}")
}

fn curl(namespace: &Namespace, url: &str, within: Duration) -> Result<Command> {
    let mut command = namespace.command("curl")?;
    command.args(["--silent", "--show-error", "--fail", "--globoff"]);
    command.args(["--noproxy", "*"]);
    command.args(["--max-time", &within.as_secs().to_string(), url]);
    Ok(command)
}

/// Fetches a small document from inside `namespace`.
pub fn fetch(namespace: &Namespace, url: &str, within: Duration) -> Result<Vec<u8>> {
    Ok(run(&mut curl(namespace, url, within)?)?.stdout)
}

/// Fetches a small document from inside `namespace`, by one of its addresses.
pub fn fetch_from(
    namespace: &Namespace,
    source: IpAddr,
    url: &str,
    within: Duration,
) -> Result<Vec<u8>> {
    let mut command = curl(namespace, url, within)?;
    command.args(["--interface", &source.to_string()]);
    Ok(run(&mut command)?.stdout)
}

/// Fetches a document and returns its SHA-256 in hex, without keeping it.
pub fn fetch_sha256(namespace: &Namespace, url: &str, within: Duration) -> Result<String> {
    let mut download = curl(namespace, url, within)?
        .stdout(Stdio::piped())
        .spawn()
        .context("start curl; is it installed?")?;
    let content = download.stdout.take().context("curl has no stdout")?;
    let sum = run_for_text(Command::new("sha256sum").stdin(content))?;
    let status = download.wait()?;
    ensure!(status.success(), "curl {url} failed ({status})");
    first_word(&sum)
}

/// The SHA-256 of `content` in hex.
pub fn sha256(content: &[u8]) -> Result<String> {
    use std::io::Write;
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start sha256sum")?;
    let mut input = child.stdin.take().context("sha256sum has no stdin")?;
    input.write_all(content)?;
    drop(input);
    let output = child.wait_with_output()?;
    first_word(&String::from_utf8(output.stdout)?)
}

fn first_word(text: &str) -> Result<String> {
    text.split_whitespace()
        .next()
        .map(str::to_string)
        .context("sha256sum wrote nothing")
}

/// `length` bytes in which no two stretches are alike, the same on every run.
///
/// A file of one repeated byte would arrive "unchanged" with segments lost or swapped.
pub fn varied_content(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut content = Vec::with_capacity(length + 8);
    while content.len() < length {
        // xorshift64: long period, no dependency, and fast even without optimisation.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        content.extend_from_slice(&state.to_le_bytes());
    }
    content.truncate(length);
    content
}
