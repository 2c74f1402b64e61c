//! What a packet costs, beside a bare redirect and nftables.

use std::time::Duration;

use anyhow::{Context, Result};
use aya::Ebpf;
use clap::Args;
use portfwd_tests::address::{GATEWAY_WAN, SERVER};
use portfwd_tests::daemon::{Daemon, DaemonOptions};
use portfwd_tests::pipeline::{self, Order, PORT, Pipeline, Sample};
use portfwd_tests::{Lab, LabOptions, Mode, Offloads, nftables};

/// How much and how often.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Rounds; each runs every contestant once
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Frames of a measurement
    #[arg(long, default_value_t = 400_000)]
    frames: u32,
    /// Numbers of flows, powers of two
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1024, 131_072])]
    flows: Vec<u32>,
}

/// What the gateway does in a pipeline. The fields keep it doing so.
enum Gateway<'lab> {
    Redirect {
        _program: Ebpf,
    },
    Nftables,
    Portfwd {
        _daemon: Box<Daemon>,
        _lab: &'lab Lab,
    },
}

struct Contestant<'lab> {
    name: &'static str,
    _gateway: Gateway<'lab>,
    pipeline: Pipeline<'lab>,
}

/// Measures and prints.
pub fn run(arguments: &Arguments) -> Result<()> {
    let labs = [
        "bare redirect",
        "portfwd xdp",
        "portfwd tc",
        "nftables DNAT",
    ]
    .map(|name| -> Result<_> {
        Ok((name, LabOptions::default().offloads(Offloads::Off).build()?))
    });
    let labs = labs.into_iter().collect::<Result<Vec<_>>>()?;
    let mut contestants = Vec::new();
    for (name, lab) in &labs {
        eprintln!("preparing {name}");
        contestants.push(prepare(name, lab).with_context(|| format!("prepare {name}"))?);
    }
    println!(
        "ns per packet, median of {} rounds of {} frames (least - most), ratio to the bare redirect",
        arguments.rounds, arguments.frames
    );
    for &flows in &arguments.flows {
        for order in [Order::Sequential, Order::Scattered] {
            if flows == 1 && order == Order::Scattered {
                continue;
            }
            measure(arguments, &mut contestants, flows, order)?;
        }
    }
    Ok(())
}

fn prepare<'lab>(name: &'static str, lab: &'lab Lab) -> Result<Contestant<'lab>> {
    // A veth end without XDP takes redirected frames only with GRO on.
    lab.wan_end().turn_gro_on()?;
    let gateway = match name {
        "bare redirect" => Gateway::Redirect {
            _program: pipeline::redirect(lab)?,
        },
        "portfwd xdp" => portfwd(lab, Mode::Xdp)?,
        "portfwd tc" => portfwd(lab, Mode::Tc)?,
        _ => {
            let forward = nftables::Forward {
                listen: (GATEWAY_WAN.v4, PORT).into(),
                target: (SERVER.v4, 6000).into(),
            };
            lab.gateway
                .sysctl("net.netfilter.nf_conntrack_max", "1048576")
                .ok();
            nftables::forward(&lab.gateway, &[forward])?;
            Gateway::Nftables
        }
    };
    Ok(Contestant {
        name,
        _gateway: gateway,
        pipeline: Pipeline::new(lab)?,
    })
}

fn portfwd(lab: &Lab, mode: Mode) -> Result<Gateway<'_>> {
    let daemon = DaemonOptions::new(mode).start(&lab.gateway)?;
    daemon.ok(&[
        "add",
        "udp",
        &PORT.to_string(),
        &format!("{}:6000", SERVER.v4),
    ])?;
    Ok(Gateway::Portfwd {
        _daemon: Box::new(daemon),
        _lab: lab,
    })
}

fn measure(
    arguments: &Arguments,
    contestants: &mut [Contestant<'_>],
    flows: u32,
    order: Order,
) -> Result<()> {
    let mut samples: Vec<Vec<Sample>> = contestants.iter().map(|_| Vec::new()).collect();
    for contestant in &mut *contestants {
        // Every flow begins before anything is measured.
        contestant
            .pipeline
            .run(flows.max(1024), flows, Order::Sequential)?;
    }
    for _ in 0..arguments.rounds {
        for (contestant, samples) in contestants.iter_mut().zip(&mut samples) {
            samples.push(contestant.pipeline.run(arguments.frames, flows, order)?);
        }
    }
    println!("\n{flows} flows, {order:?}");
    let mut reference = None;
    for (contestant, samples) in contestants.iter().zip(&mut samples) {
        samples.sort_by_key(|sample| sample.per_frame);
        let median = samples[samples.len() / 2].per_frame;
        let reference = *reference.get_or_insert(median);
        let lost = samples.iter().map(|sample| sample.loss).fold(0.0, f64::max);
        println!(
            "  {:<16}{:>6} ({} - {})   {:.2}{}",
            contestant.name,
            median.as_nanos(),
            samples[0].per_frame.as_nanos(),
            samples[samples.len() - 1].per_frame.as_nanos(),
            ratio(median, reference),
            if lost > 0.0005 {
                format!("   {:.2}% lost: not to be trusted", lost * 100.0)
            } else {
                String::new()
            },
        );
    }
    Ok(())
}

fn ratio(one: Duration, other: Duration) -> f64 {
    one.as_secs_f64() / other.as_secs_f64()
}
