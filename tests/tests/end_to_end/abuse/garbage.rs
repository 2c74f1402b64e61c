//! Bytes at random, and requests with something changed at random.

use anyhow::{Context, Result, ensure};

use super::scene::{LIFETIME, Scene, get, post};

/// So that a failure can be had again.
const SEED: u64 = 0x706f_7274_6677_6421;
const RUNS: usize = 2000;

/// Says `bytes` on a connection of its own, and checks that the daemon answers as HTTP has it, or hangs up.
fn expect_composure(scene: &Scene, bytes: &[u8]) -> Result<()> {
    let mut connection = scene.connect()?;
    connection.say(bytes)?;
    connection.end()?;
    let answer = connection.answer(LIFETIME)?;
    // 501 and 505 are HTTP's own words for what it does not know.
    ensure!(
        answer.status < 500 || matches!(answer.status, 501 | 505),
        "{answer:?}"
    );
    Ok(())
}

fn random_bytes(random: &mut fastrand::Rng) -> Vec<u8> {
    let length = random.usize(..4096);
    (0..length).map(|_| random.u8(..)).collect()
}

/// A request that was right, before some of its bytes were changed, removed, doubled or put elsewhere.
fn mutated(random: &mut fastrand::Rng, requests: &[String]) -> Vec<u8> {
    let mut bytes = requests[random.usize(..requests.len())]
        .clone()
        .into_bytes();
    for _ in 0..random.usize(1..8) {
        if bytes.is_empty() {
            break;
        }
        let at = random.usize(..bytes.len());
        let length = random.usize(1..=16).min(bytes.len() - at);
        match random.u8(..6) {
            0 => bytes[at] = random.u8(..),
            1 => bytes[at] ^= 1 << random.u8(..8),
            2 => drop(bytes.drain(at..at + length)),
            3 => {
                let piece = bytes[at..at + length].to_vec();
                let to = random.usize(..=bytes.len());
                bytes.splice(to..to, piece);
            }
            4 => bytes.truncate(at),
            _ => {
                let word = [
                    "\r\n\r\n",
                    "\0",
                    "content-length: 99999999999999999999\r\n",
                    "transfer-encoding: chunked\r\n",
                    "{\"rules\":[[[[[[[[",
                    "-1",
                    "\u{202e}",
                ];
                let word = word[random.usize(..word.len())];
                bytes.splice(at..at, word.bytes());
            }
        }
    }
    bytes
}

#[test]
fn random_bytes_and_mutated_requests_do_no_harm() -> Result<()> {
    let scene = Scene::new(3)?;
    let requests = [
        get("/v1/status"),
        get("/v1/rules"),
        get("/v1/flows"),
        get("/v1/counters"),
        // Of rules that are not there, and conflict: the rules stay as they are.
        post(r#"{"proto":"udp","listen":"10000-10002","target":"10.2.0.2","name":"web"}"#),
        "DELETE /v1/rules/nobody HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".to_string(),
        "DELETE /v1/rules HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: 20\r\n\r\n{\"rules\":[\"nobody\"]}"
            .to_string(),
    ];
    let mut random = fastrand::Rng::with_seed(SEED);
    for run in 0..RUNS {
        let bytes = if run % 4 == 0 {
            random_bytes(&mut random)
        } else {
            mutated(&mut random, &requests)
        };
        expect_composure(&scene, &bytes)
            .with_context(|| format!("run {run}: {:?}", String::from_utf8_lossy(&bytes)))?;
    }
    scene.expect_served_in_bounds()?;
    // A mutation may be a right request by accident, but the three rules were never named.
    ensure!(scene.daemon.rules()?.len() >= 3);
    Ok(())
}
