//! The kernel's programs and the model side by side: what the one makes of a frame, the other must make of it too.

use std::collections::{HashMap, VecDeque};
use std::fmt::Debug;
use std::hash::Hash;
use std::iter::successors;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use bytemuck::bytes_of;
use portfwd_common::{
    abi::{
        Config, FlowEntry, FlowKey, Instant, Pressure, Protocol, Rule, Ticks, Usage,
        fragment::{DatagramKey, FRAGMENT_SECONDS},
    },
    datapath::{
        Hook, Table, Tables as _, Verdict, Way, limits::Pace, refusal::ERROR_RATE, tcp::Side,
    },
    model::{Model, rules::Lowered, world},
    net::Address,
};

use crate::kernel::{Entry, FlowMap, Kernel, older};
use crate::test_run::{Run, SHORTEST, Segments, Sums};

/// Frames that a disagreement shows, the last one being the one in question.
const SHOWN: usize = 4;

/// A frame on its way in, or out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crossing {
    /// The program it meets.
    pub entry: Entry,
    /// The interface.
    pub ifindex: u32,
    /// The frame.
    pub frame: Vec<u8>,
    /// The packets that it stands for.
    pub segments: Segments,
}

impl Crossing {
    /// A plain frame.
    pub const fn new(entry: Entry, ifindex: u32, frame: Vec<u8>) -> Self {
        Self {
            entry,
            ifindex,
            frame,
            segments: Segments { count: 0, size: 0 },
        }
    }

    /// Whether the kernel takes the frame for a test run: TC wants a whole IP header behind a link header that announces one.
    pub fn is_taken(&self) -> bool {
        let shortest = match self.frame.get(12..SHORTEST) {
            None => return false,
            Some([0x08, 0x00]) if self.entry != Entry::Xdp => SHORTEST + 20,
            Some([0x86, 0xdd]) if self.entry != Entry::Xdp => SHORTEST + 40,
            Some(_) => SHORTEST,
        };
        self.frame.len() >= shortest
    }
}

/// Both, with the same tables.
pub struct Twins {
    kernel: Kernel,
    model: Model,
    config: Config,
    sums: Sums,
    /// Ticks by which the model's clock may have been behind the kernel's.
    slack: u32,
    errors: ErrorBudget,
    last: VecDeque<String>,
}

/// What is left of the ICMP errors that clients may get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ErrorBudget {
    /// As many as the burst.
    Full,
    /// Some may have been sent.
    Touched,
}

/// What a program returns for a verdict.
pub fn code(hook: Hook, verdict: &Verdict) -> u32 {
    const XDP_DROP: u32 = 1;
    const XDP_PASS: u32 = 2;
    const XDP_REDIRECT: u32 = 4;
    const TC_ACT_UNSPEC: u32 = u32::MAX;
    const TC_ACT_SHOT: u32 = 2;
    const TC_ACT_REDIRECT: u32 = 7;
    let is_xdp = hook == Hook::Xdp;
    match verdict {
        Verdict::Pass(_) if is_xdp => XDP_PASS,
        Verdict::Drop(_) if is_xdp => XDP_DROP,
        Verdict::Refuse(_) if is_xdp => XDP_DROP,
        Verdict::Forward(_) if is_xdp => XDP_REDIRECT,
        Verdict::Pass(_) => TC_ACT_UNSPEC,
        Verdict::Drop(_) => TC_ACT_SHOT,
        // It leaves as an ICMP error.
        Verdict::Refuse(_) => TC_ACT_REDIRECT,
        Verdict::Forward(departure) => match departure.way {
            Way::Stack => TC_ACT_UNSPEC,
            Way::Hold | Way::Cut => TC_ACT_SHOT,
            Way::Frame | Way::Raw | Way::NewHeader | Way::Resolve | Way::Again => TC_ACT_REDIRECT,
        },
    }
}

impl Twins {
    /// Both without rules, with room for `max_flows` flows of each family. Entries stay fresh for long: what is stale, and
    /// when, is decided by the test, not by the machine's pace.
    pub fn new(max_flows: u32, sums: Sums) -> Result<Self> {
        let mut kernel = Kernel::new(max_flows)?;
        let config = kernel.configure(60)?;
        let mut model = Model::new(config, max_flows as usize);
        world::furnish(&mut model.maps);
        model.maps.pools.set_room(max_flows as usize);
        Ok(Self {
            kernel,
            model,
            config,
            sums,
            slack: 0,
            errors: ErrorBudget::Touched,
            last: VecDeque::new(),
        })
    }

    /// Entries are fresh only by the daemon's word, which is to be [renewed](Self::renew_lease).
    pub fn vouched_for(mut self) -> Result<Self> {
        self.config.leased_validity = self.config.validity;
        self.config.validity = Ticks(0);
        self.renew_lease()?;
        Ok(self)
    }

    /// No packet of a rule with light tracking has its turn to go to its flow's entry but those that a handshake makes it owe: whose
    /// turn it is otherwise is told by the clock.
    pub fn without_turns(mut self) -> Result<Self> {
        (self.config.turn_bits, self.config.turns_per_tick) = (31, 0);
        self.write_config()?;
        Ok(self)
    }

    /// Packets that the kernel's entries have met, and those that it has counted for rules.
    pub fn met_and_counted(&self) -> Result<[u64; 2]> {
        let tables = self.kernel.flows()?;
        let v4 = tables
            .iter()
            .flat_map(|(v4, _)| v4.values().map(|e| e.traffic.packets));
        let v6 = tables
            .iter()
            .flat_map(|(_, v6)| v6.values().map(|e| e.traffic.packets));
        let counters = self.kernel.counters()?;
        let counted = counters
            .values()
            .map(|port| port.to_target.packets + port.to_client.packets);
        Ok([v4.chain(v6).sum(), counted.sum()])
    }

    /// Renews the daemon's word, if it has given it, for as long as can be.
    pub fn renew_lease(&mut self) -> Result<()> {
        if self.config.leased_validity != Ticks(0) {
            self.config.lease_end = self.kernel.now()?.plus(self.config.leased_validity);
            self.write_config()?;
        }
        Ok(())
    }

    fn write_config(&mut self) -> Result<()> {
        self.model.maps.config = Some(self.config);
        self.kernel.write_config(&self.config)
    }

    /// Puts a frame before both, and compares verdict, bytes and reasons. So it does with whatever comes in again because of it.
    pub fn cross(&mut self, crossing: &Crossing) -> Result<Verdict> {
        let verdict = self.cross_once(crossing)?;
        while let Some((frame, arrival)) = self.model.backlog.pop_front() {
            let _ = self.cross_once(&Crossing::new(crossing.entry, arrival.ifindex, frame))?;
        }
        Ok(verdict)
    }

    fn cross_once(&mut self, crossing: &Crossing) -> Result<Verdict> {
        let Crossing {
            entry,
            ifindex,
            frame,
            segments,
        } = crossing;
        self.remember(format!("{crossing:02x?}"));
        assert!(crossing.is_taken(), "{}", self.story());
        self.let_resets_grow_old()?;
        self.let_fragments_be_remembered_or_forgotten(frame)?;
        self.let_errors_be_sent(*entry)?;
        let before = self.kernel.now()?;
        self.model.now = before;
        let mut expected = frame.clone();
        let verdict = self
            .model
            .run(&mut expected, &entry.arrival(*ifindex, *segments));
        let run = self
            .kernel
            .run(
                *entry,
                *ifindex,
                frame,
                *segments,
                self.sums_of(*entry, &verdict),
            )
            .with_context(|| self.story())?;
        let after = self.kernel.now()?;
        if let Verdict::Refuse(_) = verdict {
            self.errors = ErrorBudget::Touched;
        }
        // The kernel's clock may tick between the looks at it.
        self.slack = self.slack.max(after.since(before).0 + 1);
        let mut run = run;
        if *entry == Entry::TcRaw {
            forget_ethertype(&mut run, &mut expected, frame.len());
        }
        let expected = Run {
            code: code(entry.hook(), &verdict),
            frame: expected,
        };
        assert_eq!(run, expected, "{verdict:?}\n{}", self.story());
        let (reasons, expected) = (self.kernel.reasons()?, self.model.maps.reasons());
        assert_eq!(reasons, expected, "{verdict:?}\n{}", self.story());
        Ok(verdict)
    }

    /// Whether a packet came after a RST is told by the clock, of which the model's may be some ticks behind: so the next packet
    /// waits until both agree.
    fn let_resets_grow_old(&self) -> Result<()> {
        let flows = &self.model.flows;
        let is_reset = |seen: u8| seen & Side::RST != 0;
        let v4 = flows.v4.values().chain(flows.opening_v4.values());
        let v6 = flows.v6.values().chain(flows.opening_v6.values());
        let resets = v4
            .filter(|entry| is_reset(entry.tcp_seen))
            .map(|entry| entry.last_seen)
            .chain(
                v6.filter(|entry| is_reset(entry.tcp_seen))
                    .map(|entry| entry.last_seen),
            );
        for last_seen in resets {
            while self.kernel.now()?.since(last_seen).0 <= self.slack + 1 {
                std::hint::spin_loop();
            }
        }
        Ok(())
    }

    /// Whether a datagram that has waited for long is still remembered is told by the clock, too: a fragment that may be one of it
    /// waits until both have forgotten it.
    fn let_fragments_be_remembered_or_forgotten(&self, frame: &[u8]) -> Result<()> {
        let second = self.config.ticks_per_second;
        let life = second * FRAGMENT_SECONDS;
        let margin = self.slack + second / 50 + 1;
        let flows = &self.model.flows;
        let datagrams = flows
            .datagrams
            .iter()
            .map(|(key, datagram)| (key, datagram.last_seen));
        let held = flows
            .held
            .iter()
            .map(|(key, (since, _))| (&key.datagram, *since));
        let now = self.kernel.now()?;
        let is_near_its_end = |since: Instant| now.since(since).0.abs_diff(life) <= margin;
        for (key, since) in datagrams.chain(held) {
            if is_near_its_end(since) && may_be_of(frame, key) {
                while self.kernel.now()?.since(since).0 <= life + margin {
                    std::hint::spin_loop();
                }
            }
        }
        Ok(())
    }

    /// Whether there is another error to be sent is told by the clock, too: so there always is one. But none for packets without
    /// link header: a test run finds their protocol where a link header would have it, and the helper that makes room takes IP
    /// packets only.
    fn let_errors_be_sent(&mut self, entry: Entry) -> Result<()> {
        /// Ticks for which no error may be sent: more than it takes to cross.
        const LONG: u32 = 1_000;
        let now = self.kernel.now()?;
        let pace = Pace::of(&ERROR_RATE, self.config.ticks_per_second);
        let pace = pace.context("there is no limit")?;
        let due = match (entry, self.errors) {
            (Entry::TcRaw, _) => {
                self.errors = ErrorBudget::Touched;
                let later = now.plus(Ticks(LONG));
                let unused = Usage::unused(later).due;
                let taken = successors(Some(unused), |due| pace.next(*due, later));
                taken.last().unwrap_or(unused)
            }
            (_, ErrorBudget::Full) => return Ok(()),
            (_, ErrorBudget::Touched) => {
                self.errors = ErrorBudget::Full;
                Usage::unused(now).due
            }
        };
        self.model.maps.error_budgets.fill(due);
        self.kernel.fill_error_budgets(due)
    }

    fn sums_of(&self, entry: Entry, verdict: &Verdict) -> Sums {
        // Bytes that take the place of others make the kernel forget the sum over them, which a test run does not notice.
        if let Verdict::Forward(departure) = verdict
            && matches!(departure.way, Way::Again | Way::Cut)
        {
            return Sums::Unknown;
        }
        if let Verdict::Refuse(_) = verdict {
            return Sums::Unknown;
        }
        match entry {
            Entry::Tc | Entry::TcSlow | Entry::TcOut => self.sums,
            // XDP sees no sum; and the kernel sums up what follows 14 bytes, link header or not.
            Entry::Xdp | Entry::TcRaw => Sums::Unknown,
        }
    }

    /// Compares flows, counters and pressure.
    pub fn compare_books(&self) -> Result<()> {
        let story = || self.story();
        assert_eq!(
            self.kernel.counters()?,
            self.model.maps.counters(),
            "{}",
            story()
        );
        let pressure = self.kernel.pressure()?;
        let expected = self.model.maps.pressure();
        assert_eq!(pressure.was_full, expected.was_full, "{}", story());
        assert!(
            self.is_same_time(pressure.full_at, expected.full_at),
            "{}",
            story()
        );
        assert_eq!(
            self.kernel.pools()?,
            self.model.maps.pools.all(),
            "{}",
            story()
        );
        self.compare_bindings()?;
        let (rules, sources) = self.kernel.usages()?;
        self.compare_usages(rules, &self.model.maps.usages.rules());
        self.compare_usages(sources, &self.model.maps.usages.sources());
        let model = &self.model.flows;
        for (table, v4, v6) in [
            (Table::Flows, &model.v4, &model.v6),
            (Table::Opening, &model.opening_v4, &model.opening_v6),
        ] {
            self.compare_flows(self.kernel.flows_v4(table)?, v4.iter());
            self.compare_flows(self.kernel.flows_v6(table)?, v6.iter());
        }
        Ok(())
    }

    fn compare_flows<'a, A: Address>(
        &self,
        kernel: FlowMap<A>,
        model: impl Iterator<Item = (&'a FlowKey<A>, &'a FlowEntry<A>)>,
    ) {
        let mut kernel = kernel;
        for (key, entry) in model {
            let Some(found) = kernel.remove(key) else {
                panic!("the kernel has no {key:?}\n{}", self.story());
            };
            for (found, expected) in [
                (found.created, entry.created),
                (found.last_seen, entry.last_seen),
            ] {
                assert!(
                    self.is_same_time(found, expected),
                    "{key:?}: {found:?} and {expected:?}\n{}",
                    self.story()
                );
            }
            let ago = |entry: &FlowEntry<A>| entry.validated.until(self.model.now).0 as u16;
            let (found_ago, expected_ago) = (ago(&found), ago(entry));
            assert!(
                u32::from(expected_ago.wrapping_sub(found_ago).wrapping_add(1)) <= self.slack + 2,
                "{key:?}: validated {found_ago} and {expected_ago} ticks ago\n{}",
                self.story()
            );
            let found = FlowEntry {
                created: entry.created,
                last_seen: entry.last_seen,
                validated: entry.validated,
                ..found
            };
            assert_eq!(&found, entry, "{key:?}\n{}", self.story());
        }
        assert!(
            kernel.is_empty(),
            "the kernel has {:?} besides\n{}",
            kernel.keys(),
            self.story()
        );
    }

    fn compare_bindings(&self) -> Result<()> {
        let (mut kernel, model) = (self.kernel.bindings()?, self.model.maps.pools.bindings());
        for (key, expected) in &model {
            let found = kernel.remove(key);
            let same = found.is_some_and(|found| {
                found.port == expected.port && self.is_same_time(found.used, expected.used)
            });
            assert!(
                same,
                "{key:?}: {found:?} and {expected:?}\n{}",
                self.story()
            );
        }
        assert!(kernel.is_empty(), "{kernel:?} besides\n{}", self.story());
        Ok(())
    }

    fn compare_usages<K>(&self, mut kernel: HashMap<K, Usage>, model: &HashMap<K, Usage>)
    where
        K: Debug + Eq + Hash,
    {
        let instant = |usage: &Usage| Instant::from_ticks(usage.due >> 32);
        for (key, expected) in model {
            let found = kernel.remove(key);
            let same = found.is_some_and(|found| {
                let due = expected.due;
                Usage { due, ..found } == *expected
                    && self.is_same_time(instant(&found), instant(expected))
            });
            assert!(
                same,
                "{key:?}: {found:?} and {expected:?}\n{}",
                self.story()
            );
        }
        assert!(kernel.is_empty(), "{kernel:?} besides\n{}", self.story());
    }

    fn is_same_time(&self, kernel: Instant, model: Instant) -> bool {
        kernel.since(model).0.wrapping_add(1) <= self.slack + 2
    }

    /// Puts rules in the place of those that are there, and forgets what others have used of their limits; the generation goes
    /// up.
    pub fn set_rules(&mut self, rules: &Lowered) -> Result<()> {
        self.remember(format!("{} rules", rules.rules.len()));
        self.model.maps.rules = rules.clone();
        self.kernel.set_rules(rules.clone())?;
        self.model.maps.usages.clear();
        self.kernel.forget_usages()?;
        self.config.flags &= !(Config::HAS_RESTS | Config::HAS_LIGHTS);
        if rules.rules.values().any(Rule::is_light) {
            self.config.flags |= Config::HAS_LIGHTS;
        }
        if !rules.rests.is_empty() {
            self.config.flags |= Config::HAS_RESTS;
        }
        self.bump_generation()
    }

    /// The gateway opens a socket, connected to a peer or not: a real one, which the caller keeps.
    pub fn know_socket(&mut self, protocol: Protocol, own: SocketAddr, peer: Option<SocketAddr>) {
        self.model.maps.add_socket(protocol, own, peer);
    }

    /// Makes every entry stale.
    pub fn bump_generation(&mut self) -> Result<()> {
        self.remember("the generation goes up".into());
        self.config.epoch = self.config.epoch.next();
        self.write_config()
    }

    /// Has sources trusted that were not, and the other way round.
    pub fn turn_trust(&mut self) -> Result<()> {
        self.remember("what is said of trust in sources is turned round".into());
        self.config.flags ^= Config::TRUSTS_SOURCES;
        self.write_config()
    }

    /// Makes everything happen that much earlier, which is the same as waiting.
    pub fn age(&mut self, seconds: u32) -> Result<()> {
        self.remember(format!("{seconds} s pass"));
        let ticks = Ticks(seconds * self.config.ticks_per_second);
        self.kernel.age(ticks)?;
        let flows = &mut self.model.flows;
        for entry in flows.v4.values_mut().chain(flows.opening_v4.values_mut()) {
            *entry = older(*entry, ticks);
        }
        for entry in flows.v6.values_mut().chain(flows.opening_v6.values_mut()) {
            *entry = older(*entry, ticks);
        }
        self.model.maps.pools.age(ticks);
        self.model.maps.usages.age(ticks);
        let pressure = self.model.maps.pressure();
        let full_at = pressure.full_at.minus(ticks);
        self.model.maps.set_pressure(Pressure {
            full_at,
            ..pressure
        });
        Ok(())
    }

    /// How often something was counted.
    pub fn counted(&self, index: u32) -> u64 {
        self.model.maps.reason(index)
    }

    fn remember(&mut self, what: String) {
        if self.last.len() == SHOWN {
            self.last.pop_front();
        }
        self.last.push_back(what);
    }

    fn story(&self) -> String {
        self.last.iter().fold("lately:".to_owned(), |story, what| {
            format!("{story}\n  {what}")
        })
    }
}

/// A test run finds the protocol of a packet in the place where a link header would have it, and the program puts that into
/// the header that it makes. Only there the two may differ.
fn forget_ethertype(run: &mut Run, expected: &mut [u8], len: usize) {
    if run.frame.len() == len + SHORTEST && expected.len() == run.frame.len() {
        run.frame[12..14].fill(0);
        expected[12..14].fill(0);
    }
}

/// Whether a frame has the source and the identification of a datagram somewhere.
fn may_be_of(frame: &[u8], datagram: &DatagramKey) -> bool {
    let (source, id) = (bytes_of(&datagram.src), datagram.id.to_ne_bytes());
    let (source, id) = if datagram.kind == 6 {
        (source, &id[..])
    } else {
        (&source[..4], &id[..2])
    };
    let has = |part: &[u8]| frame.windows(part.len()).any(|window| window == part);
    has(source) && has(id)
}
