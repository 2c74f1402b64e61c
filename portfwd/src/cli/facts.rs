//! What `doctor`, `explain` and `check-port` begin with: everything about a gateway that can be read.

use portfwd_common::abi::Role;

use super::source::{Remains, ask};
use crate::{
    control::protocol::StatusReport,
    diagnose::{Facts, Sides, gather},
    failure::{Failure, Kind, Result},
    instance::Instance,
};

/// Asks the daemon, or what it left, and the kernel. `wanted` are interfaces to look at besides those that are attached. The
/// calling thread is in the instance's network namespace afterwards.
pub async fn facts(instance: &Instance, wanted: Vec<(Role, String)>) -> Result<Facts> {
    let mut answers = Sides {
        wanted,
        ..Sides::default()
    };
    match ask::<StatusReport>(instance, "/v1/status", Remains::status).await {
        Ok(status) => {
            answers.status = Some(status);
            match ask(instance, "/v1/rules", Remains::rules).await {
                Ok(rules) => answers.rules = rules,
                Err(failure) => answers.unreadable = Some(failure.error),
            }
        }
        // Nothing is there: a gateway before its first start.
        Err(failure) if is_nothing(instance, &failure) => {}
        Err(failure) => answers.unreadable = Some(failure.error),
    }
    instance.enter_netns()?;
    gather(instance, answers)
}

/// Whether the failure is only that nothing of the instance is on the machine.
fn is_nothing(instance: &Instance, failure: &Failure) -> bool {
    failure.kind == Kind::NotRunning && !instance.state_file().exists() && !instance.pins().exists()
}
