//! What has been counted for listen ports: an array that has a block for each CPU.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use aya::{EbpfLoader, maps::MapData};
use portfwd_common::abi::{PortCounters, counters::element, names};

use super::map::Map;

/// The kernel object's read-only word that has the length of a block.
const COUNTED_PORTS: &str = "COUNTED_PORTS";
/// The CPUs that the kernel could ever have, as a list of ranges.
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// The counters of all listen ports.
#[derive(Debug)]
pub struct Counters {
    map: Map<u32, PortCounters>,
    layout: Layout,
}

/// How many elements there are, and which is whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    ports: u32,
    cpus: u32,
}

impl Layout {
    /// Room for some ports, on every CPU that the machine could ever have.
    pub fn of_ports(ports: u32) -> Result<Self> {
        let cpus = cpus()?;
        Ok(Self { ports, cpus })
    }

    /// That of a map with so many elements.
    pub fn of_elements(elements: u32) -> Result<Self> {
        let cpus = cpus()?;
        let ports = elements / cpus;
        Ok(Self { ports, cpus })
    }

    /// Listen ports that can be counted.
    pub const fn ports(&self) -> u32 {
        self.ports
    }

    /// Elements of the map; what would be too many for one stays too many.
    pub const fn elements(&self) -> u32 {
        self.ports.saturating_mul(self.cpus)
    }

    /// Has the object loaded so.
    pub fn settle<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        loader.map_max_entries(names::COUNTERS, self.elements());
        loader.override_global(COUNTED_PORTS, &self.ports, true);
    }
}

impl Counters {
    /// Opens the map that is pinned in `directory`.
    pub fn open(directory: &Path) -> Result<Self> {
        Self::in_map(Map::open(directory, names::COUNTERS)?)
    }

    /// Those of a map that is not pinned.
    pub fn of(data: MapData) -> Result<Self> {
        Self::in_map(Map::of(data, names::COUNTERS)?)
    }

    fn in_map(map: Map<u32, PortCounters>) -> Result<Self> {
        let layout = Layout::of_elements(map.max_entries())?;
        Ok(Self { map, layout })
    }

    /// Listen ports that can be counted.
    pub const fn ports(&self) -> u32 {
        self.layout.ports
    }

    /// Counters of consecutive ports, summed over the CPUs.
    pub fn read_range(&self, first: u32, count: u32) -> Result<Vec<PortCounters>> {
        let mut sums = vec![PortCounters::default(); count as usize];
        for cpu in 0..self.layout.cpus {
            let own = self.map.read_range(self.at(first, cpu), count)?;
            for (sum, own) in sums.iter_mut().zip(&own) {
                sum.add(own);
            }
        }
        Ok(sums)
    }

    /// Sets counters of consecutive ports to zero, on every CPU.
    pub fn clear_range(&mut self, first: u32, count: u32) -> Result<()> {
        let zeros = vec![PortCounters::default(); count as usize];
        for cpu in 0..self.layout.cpus {
            self.map.write_range(self.at(first, cpu), &zeros)?;
        }
        Ok(())
    }

    const fn at(&self, port: u32, cpu: u32) -> u32 {
        element(port, cpu, self.layout.ports)
    }
}

/// One more than the highest number that a CPU could ever have (`nr_cpu_ids`): numbers need not be without gaps.
fn cpus() -> Result<u32> {
    let listed = fs::read_to_string(POSSIBLE).with_context(|| format!("cannot read {POSSIBLE}"))?;
    beyond_the_last(&listed).with_context(|| format!("{POSSIBLE} has no list of CPUs: {listed:?}"))
}

fn beyond_the_last(listed: &str) -> Option<u32> {
    let last = listed.trim_end().rsplit([',', '-']).next()?;
    last.parse::<u32>().ok()?.checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_reach_to_the_last_cpu_that_there_could_be() {
        for (listed, cpus) in [
            ("0\n", Some(1)),
            ("0-1\n", Some(2)),
            ("0-3,8-11\n", Some(12)),
            ("0,4\n", Some(5)),
            ("\n", None),
            ("0-x\n", None),
            ("4294967295\n", None),
        ] {
            assert_eq!(beyond_the_last(listed), cpus, "{listed:?}");
        }
    }

    #[test]
    fn no_two_cpus_share_an_element() {
        let layout = Layout { ports: 3, cpus: 2 };
        let mut elements: Vec<_> = (0..layout.cpus)
            .flat_map(|cpu| (0..layout.ports).map(move |port| element(port, cpu, layout.ports)))
            .collect();
        elements.sort_unstable();
        assert!(elements.into_iter().eq(0..layout.elements()));
    }
}
