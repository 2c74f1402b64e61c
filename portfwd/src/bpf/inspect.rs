//! What is really in the kernel where an instance's pins say that its programs are.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use aya::programs::{ProgramInfo, SchedClassifier, TcAttachType};

use super::{
    mode::Hook,
    pins::Pins,
    syscall::{link_info, open_pin},
};

/// A pinned link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinnedLink {
    /// Name of the interface it was made for.
    pub interface: String,
    /// The place in the path of a packet.
    pub hook: Hook,
    /// Kernel index of the interface it is attached to; `None` once that has gone or the link was detached.
    pub ifindex: Option<u32>,
    /// Whether the program in it is one of those that are pinned.
    pub own_program: bool,
}

/// The links that are pinned for an instance.
pub fn pinned_links(pins: &Pins) -> Result<Vec<PinnedLink>> {
    let own = own_programs(pins)?;
    let mut links = Vec::new();
    for (interface, hook) in pins.linked()? {
        let path = pins.link(&interface, hook);
        let Some(link) =
            open_pin(&path).with_context(|| format!("cannot open link {}", path.display()))?
        else {
            continue;
        };
        let info = link_info(&link)
            .with_context(|| format!("cannot ask the kernel about link {}", path.display()))?;
        links.push(PinnedLink {
            interface,
            hook,
            ifindex: Some(info.ifindex).filter(|index| *index != 0),
            own_program: own.contains(&info.program),
        });
    }
    Ok(links)
}

/// Kernel numbers of the pinned programs.
pub fn own_programs(pins: &Pins) -> Result<BTreeSet<u32>> {
    let mut own = BTreeSet::new();
    for name in super::load::PROGRAMS {
        let path = pins.program(name);
        if path.exists() {
            let info = ProgramInfo::from_pin(&path)
                .with_context(|| format!("cannot look at program {}", path.display()))?;
            own.insert(info.id());
        }
    }
    Ok(own)
}

/// Names of the TC programs of other owners that see an interface's packets before `own` do. None on kernels without TCX.
pub fn tc_programs_before(interface: &str, own: &BTreeSet<u32>) -> Vec<String> {
    let Ok((_, programs)) = SchedClassifier::query_tcx(interface, TcAttachType::Ingress) else {
        return Vec::new();
    };
    let before = programs
        .iter()
        .take_while(|program| !own.contains(&program.id()));
    let names = before.map(|program| program.name_as_str().unwrap_or("without name").to_owned());
    if programs.iter().any(|program| own.contains(&program.id())) {
        names.collect()
    } else {
        Vec::new()
    }
}
