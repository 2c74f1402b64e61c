//! Requests of any size.

use anyhow::{Result, ensure};
use rstest::rstest;

use super::scene::{LIFETIME, Scene};

const TOO_LONG: u16 = 413;
const HEADER_TOO_LONG: u16 = 431;

/// A request whose body goes on, in the way that its header says, until the daemon has enough.
#[rstest]
#[case::a_length_of_a_gibibyte("content-length: 1073741824", "")]
#[case::chunks_without_end("transfer-encoding: chunked", "1000\r\n")]
fn a_huge_body_is_refused(#[case] header: &str, #[case] chunk_head: &str) -> Result<()> {
    let scene = Scene::new(1)?;
    for method in ["POST", "DELETE"] {
        let mut connection = scene.connect()?;
        connection.say(
            format!(
                "{method} /v1/rules HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{header}\r\n\r\n"
            )
            .as_bytes(),
        )?;
        let chunk_end = if chunk_head.is_empty() { "" } else { "\r\n" };
        let chunk = format!("{chunk_head}{}{chunk_end}", " ".repeat(0x1000));
        // 32 MiB, or as much as is taken.
        for _ in 0..0x2000 {
            connection.say(chunk.as_bytes())?;
        }
        connection.end()?;
        let answer = connection.answer(LIFETIME)?;
        // It may hang up while we still talk: then its answer is lost, as TCP would lose it.
        ensure!(matches!(answer.status, 0 | TOO_LONG), "{answer:?}");
        scene.expect_served_in_bounds()?;
    }
    assert_eq!(scene.daemon.rules()?.len(), 1);
    Ok(())
}

#[test]
fn a_length_that_is_too_long_is_refused_before_anything_of_it_comes() -> Result<()> {
    let scene = Scene::new(1)?;
    let answer = scene.ask(
        "POST /v1/rules HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 1073741824\r\n\r\n",
    )?;
    assert_eq!(answer.status, TOO_LONG);
    ensure!(
        answer.text().contains("at most 8388608 bytes"),
        "{answer:?}"
    );
    scene.expect_served_in_bounds()
}

#[test]
fn a_huge_header_is_refused() -> Result<()> {
    let scene = Scene::new(1)?;
    let long = "x".repeat(1 << 20);
    for request in [
        format!("GET /v1/rules HTTP/1.1\r\nhost: x\r\nx: {long}\r\n\r\n"),
        format!("GET /{long} HTTP/1.1\r\nhost: x\r\n\r\n"),
        format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(100_000)),
    ] {
        let answer = scene.ask(&request)?;
        ensure!(
            matches!(answer.status, 0 | 400 | 414 | HEADER_TOO_LONG),
            "{answer:?}"
        );
    }
    scene.expect_served_in_bounds()
}
