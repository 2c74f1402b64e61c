//! What has been counted for listen ports: an array that has a block for each CPU.

use std::path::Path;

use anyhow::Result;
use aya::{EbpfLoader, maps::MapData};
use portfwd_common::abi::{PortCounters, counters::element, names};

use super::{cpus::possible_cpus, map::Map};
use crate::failure::{Failure, Kind};

/// The kernel object's read-only word that has the length of a block.
const COUNTED_PORTS: &str = "COUNTED_PORTS";

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
        let cpus = possible_cpus()?;
        if ports.checked_mul(cpus).is_none() {
            let error = format!(
                "--max-ports {ports} is too much for {cpus} CPUs, which have counters of their own"
            );
            let hint = format!("--max-ports {} is the most", u32::MAX / cpus);
            return Err(Failure::new(Kind::Usage, error).hint(hint).into());
        }
        Ok(Self { ports, cpus })
    }

    /// That of a map with so many elements.
    pub fn of_elements(elements: u32) -> Result<Self> {
        let cpus = possible_cpus()?;
        let ports = elements / cpus;
        Ok(Self { ports, cpus })
    }

    /// Listen ports that can be counted.
    pub const fn ports(&self) -> u32 {
        self.ports
    }

    /// Elements of the map.
    pub const fn elements(&self) -> u32 {
        self.ports * self.cpus
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

#[cfg(test)]
mod tests {
    use super::*;

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
