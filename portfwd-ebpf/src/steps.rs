//! What the steps of the slow path share.

use core::{arch::asm, ffi::c_void};

use portfwd_common::datapath::{Flows, Job, Step, Workspace};

use crate::{
    maps::{FlowMaps, Maps, SlowPath},
    time::now,
};

/// Notes when the packet came, for all steps.
#[inline(always)]
pub fn begin<A: SlowPath>() {
    if let Some(work) = A::workspace() {
        work.now = now();
    }
}

/// Runs a step in the workspace.
#[inline(always)]
pub fn with<A: SlowPath, I, R>(
    ctx: *mut c_void,
    input: I,
    absent: R,
    step: impl FnOnce(&Job<I, Maps>, &mut Workspace<A>, &mut FlowMaps) -> R,
) -> R
where
    FlowMaps: Flows<A>,
{
    // A use that LLVM cannot see through: a step that does not look at the context would lose its argument, of which the type
    // information still speaks ("arg#0 expects pointer to ctx", kernel 6.18, LLVM 22). Not empty, because two lines at one
    // instruction are refused ("Invalid line_info").
    // SAFETY: a register is copied onto itself.
    unsafe { asm!("{0} = {0}", in(reg) ctx.addr(), options(nomem, nostack)) };
    let Some(work) = A::workspace() else {
        return absent;
    };
    let job = Job {
        input,
        tables: Maps { ctx },
        now: work.now,
    };
    step(&job, work, &mut FlowMaps)
}

/// See `Context::returned`.
#[inline(always)]
pub fn returned(step: Step) -> Step {
    let mut is_done = match step {
        Step::Next => 0_u64,
        Step::Done => 1,
    };
    // SAFETY: a register is copied onto itself.
    unsafe { asm!("{0} = {0}", inout(reg) is_done, options(nomem, nostack)) };
    if is_done == 0 { Step::Next } else { Step::Done }
}
