//! The maps of rules in memory, looked up as the datapath looks them up.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Deref,
};

use anyhow::{Result, ensure};
use portfwd_common::{
    abi::{
        self, Admission, Bank, EndpointKey, PortSlot, Protocol,
        rule::{PORT_SLOTS, port_index},
    },
    net::{Be16, Family, Ipv6},
};

use super::{
    RuleMaps,
    prefix::{Entry, Prefix},
    sources::{SourceEntry, SourcePrefix},
    write::{Lighting, Remembering, RuleWrite, Step, Write, Writes},
};

type Trie = HashMap<(u32, [u8; 20]), u16>;

/// One bank of the rule tables.
#[derive(Clone, Debug, PartialEq)]
pub struct BankModel {
    pub rules: BTreeMap<u16, abi::Rule>,
    pub listens: Trie,
    pub targets: Trie,
    pub rests: Trie,
    pub ports: Vec<PortSlot>,
}

/// The maps; what is in the bank that packets look at is at hand. A step can be made to fail.
pub struct Model {
    pub banks: [BankModel; 2],
    pub bank: Bank,
    pub remembering: Option<Remembering>,
    pub lighting: Option<Lighting>,
    pub sources: HashMap<SourcePrefix, Admission>,
    pub generation: u32,
    pub cleared: Vec<(u32, u32)>,
    pub max_ports: u32,
    /// After so many steps `failures` fail, those after it do not.
    pub fail_after: Option<usize>,
    /// How many.
    pub failures: usize,
}

impl Model {
    pub fn new(max_ports: u32) -> Self {
        Self {
            banks: [BankModel::new(), BankModel::new()],
            bank: Bank::A,
            remembering: None,
            lighting: None,
            sources: HashMap::new(),
            generation: 0,
            cleared: Vec::new(),
            max_ports,
            fail_after: None,
            failures: 1,
        }
    }

    /// Carries a change out; both banks are the same then.
    pub fn apply(&mut self, writes: &Writes) {
        for step in writes.steps(self.bank) {
            self.carry_out(step).unwrap();
        }
        assert!(self.is_settled());
    }

    /// Whether both banks hold the same.
    pub fn is_settled(&self) -> bool {
        let [first, second] = &self.banks;
        first == second
    }

    /// The elements of RULES that anybody has and that packets find.
    pub fn rules(&self) -> Result<Vec<(u16, abi::Rule)>> {
        self.rules_in(self.bank)
    }
}

impl Deref for Model {
    type Target = BankModel;

    fn deref(&self) -> &BankModel {
        &self.banks[self.bank as usize]
    }
}

impl BankModel {
    fn new() -> Self {
        Self {
            rules: BTreeMap::new(),
            listens: Trie::new(),
            targets: Trie::new(),
            rests: Trie::new(),
            ports: vec![PortSlot::EMPTY; PORT_SLOTS as usize],
        }
    }

    /// The slot that a packet from the WAN to this endpoint finds.
    pub fn winner(
        &self,
        address: IpAddr,
        protocol: Protocol,
        port: u16,
        wan: &[IpAddr],
    ) -> Option<u16> {
        let rule = self.certain_winner(address, protocol, port, wan);
        rule.or_else(|| self.rest(address, protocol, port, wan))
    }

    /// The rule for everything else that an endpoint finds.
    fn rest(&self, address: IpAddr, protocol: Protocol, port: u16, wan: &[IpAddr]) -> Option<u16> {
        let any: IpAddr = match address {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        if self.rests.is_empty() {
            return None;
        }
        let without_address = || {
            let slot = longest_prefix(&self.rests, any, protocol, port);
            slot.filter(|_| wan.contains(&address))
        };
        let slot = longest_prefix(&self.rests, address, protocol, port).or_else(without_address)?;
        let covers = |slot: &u16| self.rules.get(slot).is_some_and(|rule| rule.covers(port));
        Some(slot).filter(covers)
    }

    fn certain_winner(
        &self,
        address: IpAddr,
        protocol: Protocol,
        port: u16,
        wan: &[IpAddr],
    ) -> Option<u16> {
        let word = self.ports[port_index(protocol.class(family(address)), port) as usize];
        if word.is_scoped()
            && let Some(slot) = longest_prefix(&self.listens, address, protocol, port)
        {
            return self
                .rules
                .get(&slot)
                .filter(|rule| rule.covers(port))
                .map(|_| slot);
        }
        let rule = self
            .rules
            .get(&word.rule())
            .filter(|rule| rule.covers(port))?;
        let listens = if rule.is_any_address() {
            wan.contains(&address)
        } else {
            !word.is_scoped() && rule.listen == Ipv6::from(address)
        };
        listens.then_some(word.rule())
    }

    /// The slot that a reply from this endpoint finds, 0 or `None` for several or no rules.
    pub fn target(&self, address: IpAddr, protocol: Protocol, port: u16) -> Option<u16> {
        longest_prefix(&self.targets, address, protocol, port)
    }
}

pub fn family(address: IpAddr) -> Family {
    if address.is_ipv4() {
        Family::V4
    } else {
        Family::V6
    }
}

fn masked(prefix_len: u32, key: EndpointKey) -> [u8; 20] {
    let mut bytes: [u8; 20] = bytemuck::cast(key);
    for bit in prefix_len..EndpointKey::BITS {
        bytes[bit as usize / 8] &= !(0x80 >> (bit % 8));
    }
    bytes
}

fn longest_prefix(trie: &Trie, address: IpAddr, protocol: Protocol, port: u16) -> Option<u16> {
    let class = Be16::new(protocol.class(family(address)));
    let key = EndpointKey {
        address: address.into(),
        class,
        port: Be16::new(port),
    };
    (144..=EndpointKey::BITS)
        .rev()
        .find_map(|bits| trie.get(&(bits, masked(bits, key))).copied())
}

impl RuleMaps for Model {
    fn bank(&self) -> Result<Bank> {
        Ok(self.bank)
    }

    fn rules_in(&self, bank: Bank) -> Result<Vec<(u16, abi::Rule)>> {
        let rules = self.banks[bank as usize].rules.iter();
        Ok(rules
            .map(|(slot, rule)| (*slot, *rule))
            .filter(|(_, rule)| rule.is_used())
            .collect())
    }

    fn sources(&self) -> Result<Vec<(SourcePrefix, Admission)>> {
        Ok(self
            .sources
            .iter()
            .map(|(key, value)| (*key, *value))
            .collect())
    }

    fn rests(&self) -> Result<Vec<Prefix>> {
        let keys = self.banks.iter().flat_map(|bank| bank.rests.keys());
        let prefix = |(length, bytes): &(u32, [u8; 20])| Prefix {
            length: *length,
            key: bytemuck::pod_read_unaligned(bytes),
        };
        let keys: BTreeSet<_> = keys.collect();
        Ok(keys.into_iter().map(prefix).collect())
    }

    fn max_ports(&self) -> u32 {
        self.max_ports
    }

    fn carry_out(&mut self, step: Step<'_>) -> Result<()> {
        if let Some(left) = &mut self.fail_after {
            if *left == 0 {
                self.failures -= 1;
                if self.failures == 0 {
                    self.fail_after = None;
                    self.failures = 1;
                }
                ensure!(false, "the kernel refuses");
            } else {
                *left -= 1;
            }
        }
        match step {
            Step::Once(write) => self.write_once(write),
            Step::In(bank, write) => {
                if matches!(write, RuleWrite::Rest(_)) {
                    assert_eq!(self.remembering, Some(Remembering::On));
                }
                self.banks[bank as usize].write(write);
            }
            Step::Turn { to, asks_flows } => {
                self.bank = to;
                self.generation += u32::from(asks_flows);
            }
        }
        Ok(())
    }
}

impl Model {
    fn write_once(&mut self, write: &Write) {
        match write {
            Write::ClearCounters { first, count } => self.cleared.push((*first, *count)),
            Write::Remember(remembering) => self.remembering = Some(*remembering),
            Write::Light(lighting) => self.lighting = Some(*lighting),
            Write::Source(SourceEntry { prefix, admission }) => match admission {
                Some(admission) => drop(self.sources.insert(*prefix, *admission)),
                None => drop(self.sources.remove(prefix)),
            },
        }
    }
}

impl BankModel {
    fn write(&mut self, write: &RuleWrite) {
        let edit = |trie: &mut Trie, Entry { prefix, slot }: &Entry| {
            let key = (prefix.length, masked(prefix.length, prefix.key));
            match slot {
                Some(slot) => drop(trie.insert(key, *slot)),
                None => drop(trie.remove(&key)),
            }
        };
        match write {
            RuleWrite::Rule { slot, rule } => {
                assert_ne!(*slot, 0);
                self.rules.insert(*slot, *rule);
            }
            RuleWrite::Listen(entry) => edit(&mut self.listens, entry),
            RuleWrite::Target(entry) => edit(&mut self.targets, entry),
            RuleWrite::Rest(entry) => edit(&mut self.rests, entry),
            RuleWrite::Ports { first_index, words } => {
                let first = *first_index as usize;
                self.ports[first..first + words.len()].copy_from_slice(words);
            }
        }
    }
}
