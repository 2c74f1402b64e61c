//! Whether a client can be where its packet came from (RFC 1812 section 5.3.8, RFC 3704).
//!
//! The kernel asks that of what it routes itself (`fib_validate_source`), and never sees what portfwd forwards. What is asked is the
//! route that the answer will take: from the address that was dialled to the client, in by the interface that the target is behind.
//! So routing by rules is heeded, and there is no list of addresses to keep up to date.
//!
//! Of the answer only the side counts, not the interface: clients may come in by one of two WAN interfaces and be answered by the
//! other (RFC 3704 section 2.3, feasible paths).

use super::{
    Scene,
    tables::{Route, Tables},
    verdict::{DropReason, Verdict},
    workspace::Workspace,
};
use crate::{
    abi::{Role, config::interface_slot},
    net::Address,
};

/// Refuses a packet that would begin a flow and whose source cannot be where it came from. An error is the verdict.
#[inline(always)]
pub fn check<A: Address, T: Tables>(
    work: &mut Workspace<A>,
    scene: &Scene<'_, T>,
) -> Result<(), Verdict> {
    let Scene {
        arrival, tables, ..
    } = *scene;
    work.partner.reverse_of(&work.key);
    let answered_by = work.path.egress().unwrap_or(arrival.ifindex);
    let back = tables.route(&work.partner, answered_by);
    if is_plausible(back, scene.ingress.role(), tables) {
        Ok(())
    } else {
        Err(Verdict::Drop(DropReason::MartianSource))
    }
}

/// Whether what came in on this side may be answered by that route. Interfaces without a program have no side.
#[inline(always)]
fn is_plausible<T: Tables>(back: Route, ingress: Role, tables: &T) -> bool {
    match back {
        Route::Refused => false,
        Route::Via { ifindex, .. } | Route::Unresolved { ifindex } => tables
            .interface(interface_slot(ifindex))
            .is_none_or(|egress| egress.ifindex != ifindex || ingress.meets(egress.role())),
        // Nothing is forwarded, or not by a way that can be told.
        Route::Stack => true,
    }
}
