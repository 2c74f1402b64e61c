//! What the daemon may do. It starts with three capabilities and goes on with two; full root has them all.

use anyhow::{Context, Result};
use caps::{CapSet, Capability, CapsHashSet};

use crate::failure::{Failure, Kind};

/// What the start needs, and for what.
const NEEDED: [(Capability, &str); 3] = [
    (Capability::CAP_BPF, "makes maps and loads programs"),
    (Capability::CAP_NET_ADMIN, "attaches programs to interfaces"),
    // Without it the verifier takes speculation into account and refuses pointer arithmetic.
    (
        Capability::CAP_PERFMON,
        "lets the verifier trust what it has proved",
    ),
];
/// What goes on to be used: for interfaces that come back, and, if it is there, to name the process that listens on a port.
const KEPT: [Capability; 3] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_SYS_PTRACE,
];

/// Refuses to start without a capability that the start needs, and names it.
pub(super) fn check() -> Result<()> {
    let effective = read(CapSet::Effective)?;
    let missing: Vec<_> = missing(&effective).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let named: Vec<_> = missing
        .iter()
        .map(|(capability, purpose)| format!("{capability} (which {purpose})"))
        .collect();
    let names: Vec<_> = missing
        .iter()
        .map(|(capability, _)| capability.to_string())
        .collect();
    let error = format!("the daemon lacks {}", named.join(", "));
    Err(Failure::new(Kind::Permission, error)
        .hint(format!(
            "run it as root with {}; the unit portfwd.service has what it takes",
            names.join(" ")
        ))
        .into())
}

fn missing(has: &CapsHashSet) -> impl Iterator<Item = (Capability, &'static str)> {
    NEEDED.into_iter().filter(|(capability, _)| {
        // From before there were the two others, and good for both of them.
        let stands_in =
            *capability != Capability::CAP_NET_ADMIN && has.contains(&Capability::CAP_SYS_ADMIN);
        !has.contains(capability) && !stands_in
    })
}

/// Gives up for good what the daemon needs no more once everything is attached. Threads that are started from here on have no
/// more than this one.
pub(super) fn drop_most() -> Result<()> {
    let dropping = "cannot drop capabilities";
    let permitted = read(CapSet::Permitted)?;
    let mut kept: CapsHashSet = KEPT.into_iter().collect();
    if !permitted.contains(&Capability::CAP_BPF) {
        kept.insert(Capability::CAP_SYS_ADMIN);
    }
    let kept: CapsHashSet = kept.intersection(&permitted).copied().collect();
    // What is effective has to be permitted, at any time.
    caps::set(None, CapSet::Effective, &kept).context(dropping)?;
    caps::set(None, CapSet::Permitted, &kept).context(dropping)
}

fn read(set: CapSet) -> Result<CapsHashSet> {
    caps::read(None, set).context("cannot read the capabilities of this process")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_told_and_sys_admin_stands_for_two() {
        use Capability::{CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN};
        for (has, expected) in [
            (&[][..], &[CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON][..]),
            (&[CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON], &[]),
            (&[CAP_BPF, CAP_NET_ADMIN], &[CAP_PERFMON]),
            (&[CAP_SYS_ADMIN], &[CAP_NET_ADMIN]),
            (&[CAP_SYS_ADMIN, CAP_NET_ADMIN], &[]),
        ] {
            let has: CapsHashSet = has.iter().copied().collect();
            let missing: Vec<_> = missing(&has).map(|(capability, _)| capability).collect();
            assert_eq!(missing, expected, "{has:?}");
        }
    }
}
