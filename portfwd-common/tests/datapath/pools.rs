//! Ports that stand for clients: nobody gets another's, and whoever can have one gets one.

use std::collections::HashSet;

use fastrand::Rng;
use portfwd_common::{
    abi::{Pool, PoolRange},
    datapath::pool::{Search, Wish, give},
    model::{maps::Plainly, pools::PoolCells},
};

const SEED: u64 = 20_250_103;

fn take(pool: &PoolCells, wish: &Wish) -> Option<u16> {
    portfwd_common::datapath::pool::take(pool, wish, &mut Search::default(), &Plainly)
}

fn wish(port: u16, first: u16, last: u16, seed: u32) -> Wish {
    Wish {
        port,
        range: PoolRange { first, last },
        seed,
    }
}

fn is_privileged(port: u16) -> bool {
    port < 1_024
}

#[test]
fn every_client_port_is_kept_while_it_is_free() {
    let pool = PoolCells::new(&Pool::FREE);
    for port in 1..=u16::MAX {
        assert_eq!(take(&pool, &wish(port, 1, u16::MAX, 0)), Some(port));
    }
    assert_eq!(take(&pool, &wish(5_000, 1, u16::MAX, 0)), None);
}

/// RFC 4787 REQ-3, REQ-3a and REQ-4: all 65,535 ports, to clients with any port, each to one only; class and parity are kept
/// for as long as there is a port of them.
#[test]
fn a_pool_is_given_out_to_the_last_port_with_class_and_parity_kept() {
    let mut rng = Rng::with_seed(SEED);
    for client in [1, 2, 500, 1_023, 1_024, 4_999, 50_000, u16::MAX] {
        let pool = PoolCells::new(&Pool::FREE);
        let mut given = HashSet::new();
        let of_kind =
            |port: u16| is_privileged(port) == is_privileged(client) && port % 2 == client % 2;
        let kind = (1..=u16::MAX).filter(|port| of_kind(*port)).count();
        let class = (1..=u16::MAX)
            .filter(|port| is_privileged(*port) == is_privileged(client))
            .count();
        while let Some(port) = take(&pool, &wish(client, 1, u16::MAX, rng.u32(..))) {
            assert!(given.insert(port), "{port} was given twice");
            assert_ne!(port, 0);
            if given.len() <= kind {
                assert!(of_kind(port), "{port} for {client}, the {}th", given.len());
            } else if given.len() <= class {
                assert_eq!(is_privileged(port), is_privileged(client));
            }
        }
        // A client without privileged port gets none.
        let all = if is_privileged(client) {
            usize::from(u16::MAX)
        } else {
            class
        };
        assert_eq!(given.len(), all, "client port {client}");
    }
}

/// EXH-05: the last port is found wherever it is and wherever the search begins.
#[test]
fn the_only_port_that_is_left_is_found_from_everywhere() {
    let mut full = Pool::FREE;
    (1..=u16::MAX).for_each(|port| full.take(port));
    let pool = PoolCells::new(&full);
    let mut rng = Rng::with_seed(SEED);
    let (clients, starts) = ([40_000, 40_001], [0, 1, 15_999, 16_000, u32::MAX]);
    for left in 1_024..=u16::MAX {
        give(&pool, left);
        let client = clients[usize::from(rng.bool())];
        let start = if rng.bool() {
            rng.u32(..)
        } else {
            *rng.choice(&starts).unwrap()
        };
        assert_eq!(take(&pool, &wish(client, 1, u16::MAX, start)), Some(left));
        assert_eq!(take(&pool, &wish(client, 1, u16::MAX, start)), None);
    }
}

#[test]
fn a_range_is_given_out_whole_and_nothing_beside_it() {
    let mut rng = Rng::with_seed(SEED);
    let edges = [
        1, 2, 63, 64, 127, 128, 129, 1_023, 1_024, 1_025, 8_191, 8_192, 65_534, 65_535,
    ];
    let mut ranges: Vec<(u16, u16)> = edges
        .iter()
        .flat_map(|first| edges.iter().map(move |last| (*first, *last)))
        .filter(|(first, last)| first <= last)
        .collect();
    for _ in 0..200 {
        let first = rng.u16(1..=u16::MAX);
        ranges.push((first, rng.u16(first..=first.saturating_add(700))));
    }
    for (first, last) in ranges {
        let pool = PoolCells::new(&Pool::FREE);
        let client = rng.u16(1..=u16::MAX);
        let mut given = HashSet::new();
        while let Some(port) = take(&pool, &wish(client, first, last, rng.u32(..))) {
            assert!((first..=last).contains(&port), "{port} of {first}-{last}");
            assert!(given.insert(port));
        }
        let allowed = (first..=last)
            .filter(|port| is_privileged(client) || last < 1_024 || !is_privileged(*port));
        assert_eq!(given.len(), allowed.count(), "{first}-{last} for {client}");
    }
}

/// Given and taken back in any order, the pool is what a plain set says.
#[test]
fn a_pool_agrees_with_a_plain_set() {
    let mut rng = Rng::with_seed(SEED);
    let pool = PoolCells::new(&Pool::FREE);
    let mut taken = HashSet::new();
    let (first, last) = (2_000, 2_999);
    for _ in 0..300_000 {
        // Near the end of the range most of the time.
        if rng.u32(..100) < 52 {
            let client = rng.u16(1_024..);
            match take(&pool, &wish(client, first, last, rng.u32(..))) {
                Some(port) => assert!(taken.insert(port), "{port} was given twice"),
                None => assert_eq!(taken.len(), usize::from(last - first) + 1),
            }
        } else if let Some(port) = taken.iter().next().copied() {
            taken.remove(&port);
            give(&pool, port);
        }
    }
    let now = pool.pool();
    for port in 1..=u16::MAX {
        assert_eq!(now.is_taken(port), taken.contains(&port));
    }
}

/// RFC 6056: where the search begins is where the seed says, evenly. The chi-square statistic of 64 equal cells exceeds 120
/// once in a hundred thousand times.
#[test]
fn ports_are_spread_evenly() {
    const CELLS: usize = 64;
    const DRAWS: u32 = 64_000;
    let mut rng = Rng::with_seed(SEED);
    let mut cells = [0_u32; CELLS];
    let mut taken_by_client = Pool::FREE;
    taken_by_client.take(30_000);
    for _ in 0..DRAWS {
        let pool = PoolCells::new(&taken_by_client);
        let port = take(&pool, &wish(30_000, 1, u16::MAX, rng.u32(..))).unwrap();
        cells[(usize::from(port) - 1_024) * CELLS / (65_536 - 1_024)] += 1;
    }
    let expected = f64::from(DRAWS) / CELLS as f64;
    let statistic: f64 = cells
        .iter()
        .map(|count| (f64::from(*count) - expected).powi(2) / expected)
        .sum();
    assert!(statistic < 120.0, "{statistic}: {cells:?}");
}
