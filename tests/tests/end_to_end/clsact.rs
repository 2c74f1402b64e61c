//! TC as kernels before 6.6 have it: filters on the clsact qdisc. This kernel has it too, beside the links that the daemon
//! takes here, so the attaching is tried without the daemon.

use std::fs;

use anyhow::{Context, Result, ensure};
use portfwd::bpf::attach::Attacher;
use portfwd::bpf::frames::Frames;
use portfwd::bpf::load::{Programs, Sizes, load};
use portfwd::bpf::mode::TcMethod;
use portfwd::bpf::xdp_features::Transmitters;
use portfwd::bpf::{Attachment, Pins, pins};
use portfwd::daemon::options::{AttachMode, Role};
use portfwd::instance::Instance;
use portfwd::netlink::link::{Link, links};
use portfwd_tests::process::run_for_text;
use portfwd_tests::{Lab, LabOptions};
use serde_json::Value;

/// An instance of its own, whose pins go with it.
struct Loaded<'a> {
    lab: &'a Lab,
    instance: Instance,
    pins: Pins,
}

impl Drop for Loaded<'_> {
    fn drop(&mut self) {
        let directory = self.instance.pins();
        let removed = self.lab.gateway.run(|| pins::remove_instance(&directory));
        if !matches!(removed, Ok(Ok(_))) {
            eprintln!("cannot remove {}: {removed:?}", directory.display());
        }
    }
}

impl Loaded<'_> {
    fn load(&self) -> Result<Programs> {
        let sizes = Sizes {
            max_flows: Some(64),
            max_ports: Some(64),
            max_half_open: None,
        };
        self.lab
            .gateway
            .run(|| load(&self.instance, &self.pins, sizes, Frames::Scattered))?
    }

    /// Makes the next load one of another build, which does not know the seal on the pins.
    fn break_seal(&self) -> Result<()> {
        for seal in fs::read_dir(self.pins.seals())? {
            fs::remove_dir(seal?.path())?;
        }
        Ok(())
    }

    /// Attaches to the WAN by clsact, as a start does.
    fn attach(&self, programs: &Programs, end: End) -> Result<Attachment> {
        self.lab.gateway.run(|| {
            let wan = link("wan0")?;
            let mut attacher = Attacher::new(&self.pins, programs, TcMethod::Clsact);
            attacher.check(&wan, AttachMode::Tc)?;
            let attachment =
                attacher.attach(&wan, Role::Wan, AttachMode::Tc, &Transmitters::default())?;
            match end {
                End::Commit => attacher.commit(std::slice::from_ref(&attachment))?,
                End::Fail => drop(attacher),
            }
            Ok(attachment)
        })?
    }

    fn holds(&self, programs: &Programs, attachment: &Attachment) -> Result<bool> {
        self.lab.gateway.run(|| {
            let wan = link(&attachment.name)?;
            Attacher::new(&self.pins, programs, TcMethod::Clsact).holds(attachment, &wan)
        })?
    }

    /// Names and numbers of the programs in the filters of a hook.
    fn filters(&self, interface: &str, hook: &str) -> Result<Vec<(String, u64)>> {
        let mut tc = self.lab.gateway.command("tc")?;
        let text = run_for_text(tc.args(["-j", "filter", "show", "dev", interface, hook]))?;
        let filters: Vec<Value> = serde_json::from_str(&text)?;
        let program = |filter: &Value| {
            let options = filter.get("options")?;
            let name = options["bpf_name"].as_str()?.to_string();
            Some((name, options["prog"]["id"].as_u64()?))
        };
        Ok(filters.iter().filter_map(program).collect())
    }
}

/// How an attachment ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Commit,
    Fail,
}

fn link(name: &str) -> Result<Link> {
    let found = links()?.into_iter().find(|link| link.name == name);
    found.with_context(|| format!("no {name}"))
}

#[test]
fn filters_are_replaced_in_their_places_and_go_with_the_instance() -> Result<()> {
    let lab = LabOptions::default().build()?;
    let instance = Instance::new(Some(lab.gateway.name()), None)?;
    let pins = Pins::new(&instance.pins());
    let loaded = Loaded {
        lab: &lab,
        instance,
        pins,
    };
    let first = loaded.load()?;
    let attachment = loaded.attach(&first, End::Commit)?;
    let before = loaded.filters("wan0", "ingress")?;
    ensure!(
        before.len() == 1 && before[0].0 == "portfwd_tc",
        "{before:?}"
    );
    ensure!(loaded.filters("wan0", "egress")?.len() == 1);
    ensure!(loaded.holds(&first, &attachment)?);

    // A restart of the same build takes its programs over, and leaves them where they are.
    loaded.attach(&loaded.load()?, End::Commit)?;
    assert_eq!(loaded.filters("wan0", "ingress")?, before);

    // A restart that fails leaves the first programs where they are.
    loaded.break_seal()?;
    let second = loaded.load()?;
    loaded.attach(&second, End::Fail)?;
    assert_eq!(loaded.filters("wan0", "ingress")?, before);
    // One that does not puts its own in the same places.
    loaded.attach(&second, End::Commit)?;
    let after = loaded.filters("wan0", "ingress")?;
    ensure!(after.len() == 1 && after[0].0 == before[0].0 && after[0].1 != before[0].1);

    // Somebody takes one off, and a start puts it back.
    lab.gateway.ip("link set wan0 down\n")?;
    let mut tc = lab.gateway.command("tc")?;
    run_for_text(tc.args(["filter", "del", "dev", "wan0", "ingress"]))?;
    ensure!(!loaded.holds(&second, &attachment)?);
    loaded.attach(&second, End::Commit)?;
    ensure!(loaded.holds(&second, &attachment)?);

    // Under another name the interface keeps its filters, until they are abandoned.
    lab.gateway.ip("link set wan0 name other0\n")?;
    ensure!(loaded.filters("other0", "ingress")?.len() == 1);
    lab.gateway.run(|| -> Result<()> {
        let attacher = Attacher::new(&loaded.pins, &second, TcMethod::Clsact);
        attacher.abandon(std::slice::from_ref(&attachment), &links()?)
    })??;
    for hook in ["ingress", "egress"] {
        assert_eq!(loaded.filters("other0", hook)?, [], "{hook}");
    }
    lab.gateway.ip("link set other0 name wan0\n")?;

    loaded.attach(&second, End::Commit)?;
    drop(loaded);
    ensure!(!has_clsact(&lab)?);
    Ok(())
}

fn has_clsact(lab: &Lab) -> Result<bool> {
    let mut tc = lab.gateway.command("tc")?;
    let qdiscs = run_for_text(tc.args(["qdisc", "show", "dev", "wan0"]))?;
    Ok(qdiscs.contains("clsact"))
}

#[test]
fn another_owners_filter_and_its_qdisc_stay() -> Result<()> {
    let lab = LabOptions::default().build()?;
    let instance = Instance::new(Some(lab.gateway.name()), None)?;
    let pins = Pins::new(&instance.pins());
    let loaded = Loaded {
        lab: &lab,
        instance,
        pins,
    };
    let programs = loaded.load()?;
    loaded.attach(&programs, End::Commit)?;
    // Any program will do; what makes it another's is where it is.
    let mut tc = lab.gateway.command("tc")?;
    tc.args(["filter", "add", "dev", "wan0", "ingress", "prio", "5"]);
    tc.args(["protocol", "all", "bpf", "direct-action", "object-pinned"]);
    run_for_text(tc.arg(loaded.pins.program("portfwd_clock")))?;
    ensure!(loaded.filters("wan0", "ingress")?.len() == 2);
    // A restart leaves it alone, too.
    loaded.attach(&loaded.load()?, End::Commit)?;
    ensure!(loaded.filters("wan0", "ingress")?.len() == 2);

    let mut tc = lab.gateway.command("tc")?;
    tc.args(["-j", "filter", "show", "dev", "wan0", "ingress"]);
    drop(loaded);
    ensure!(
        has_clsact(&lab)?,
        "the qdisc went with another's filter in it"
    );
    let filters: Vec<Value> = serde_json::from_str(&run_for_text(&mut tc)?)?;
    let priorities: Vec<_> = filters
        .iter()
        .filter_map(|filter| filter["pref"].as_u64())
        .collect();
    ensure!(
        !priorities.is_empty() && priorities.iter().all(|priority| *priority == 5),
        "{filters:?}"
    );
    Ok(())
}
