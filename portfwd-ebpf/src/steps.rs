//! What the steps of the slow path share.

use core::{arch::asm, ffi::c_void};

use aya_ebpf::bindings;
use portfwd_common::datapath::{Context, Flows, Job, Step, Workspace};

use crate::{
    maps::{FlowMaps, Maps, SlowPath, bank},
    tc::TcInput,
    time::now,
    xdp::XdpInput,
};

macro_rules! impl_context {
    ($($context:ident => $input:ident;)+) => {$(
        /// The context of a hook. By the name of the type the verifier tells that a pointer to one is that
        /// (`btf_get_prog_ctx_type`); it is the kernel's type, but the core's trait must be implemented for one of this crate.
        #[expect(non_camel_case_types, reason = "the kernel's name")]
        #[repr(transparent)]
        pub struct $context(bindings::$context);

        impl<A: SlowPath> Context<A> for $context
        where
            FlowMaps: Flows<A>,
        {
            type Input = $input;
            type Tables = Maps;
            type Flows = FlowMaps;

            #[inline(always)]
            fn with<R>(
                &mut self,
                absent: R,
                step: impl FnOnce(&Job<$input, Maps>, &mut Workspace<A>, &mut FlowMaps) -> R,
            ) -> R {
                let ctx: *mut Self = self;
                with(ctx.cast(), $input(ctx.cast()), absent, step)
            }

            #[inline(always)]
            fn returned(step: Step) -> Step {
                returned(step)
            }
        }
    )+};
}

impl_context!(xdp_md => XdpInput; __sk_buff => TcInput;);

/// Notes when the packet came, and by which bank of the rule tables it goes, for all steps.
#[inline(always)]
pub fn begin<A: SlowPath>() {
    if let Some(work) = A::workspace() {
        work.now = now();
        work.bank = bank();
    }
}

/// Runs a step in the workspace.
#[inline(always)]
fn with<A: SlowPath, I, R>(
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
        tables: Maps::in_bank(ctx, work.bank),
        now: work.now,
    };
    step(&job, work, &mut FlowMaps)
}

/// See [`Context::returned`].
#[inline(always)]
fn returned(step: Step) -> Step {
    let mut is_done = match step {
        Step::Next => 0_u64,
        Step::Done => 1,
    };
    // SAFETY: a register is copied onto itself.
    unsafe { asm!("{0} = {0}", inout(reg) is_done, options(nomem, nostack)) };
    if is_done == 0 { Step::Next } else { Step::Done }
}
