//! The configuration as a start and SIGHUP apply it.

use std::path::{Path, PathBuf};

use log::{error, info, warn};

use crate::{
    config::{Config, Problems},
    control::{
        apply::resolve_names,
        gateway::Shared,
        protocol::{Applied, ApplyRequest},
    },
    daemon::words::GatewayWords,
};

/// Reads the configuration and makes its rules hold. Rules that were added by hand stay: neither a
/// restart nor a reload takes away what somebody has added meanwhile. What is wrong is logged, and
/// the rules stay as they are.
pub(super) async fn apply(gateway: Shared, path: Option<PathBuf>, settings: GatewayWords) {
    let Some(path) = path else {
        return;
    };
    match try_apply(&gateway, &path, &settings).await {
        Ok(applied) => {
            for warning in &applied.warnings {
                warn!("{warning}");
            }
        }
        Err(problems) => {
            for problem in &problems.list {
                error!("{problem}");
            }
            error!("the rules stay as they are: {}", problems.failure);
        }
    }
}

async fn try_apply(
    gateway: &Shared,
    path: &Path,
    settings: &GatewayWords,
) -> Result<Applied, Problems> {
    let config = Config::read(path)?;
    if config.gateway.clone().over(settings.clone()) != *settings {
        info!(
            "[gateway] of {} differs from what runs: it counts from the next start",
            path.display()
        );
    }
    let request = ApplyRequest {
        rules: config.words(),
        keep_others: true,
        ..ApplyRequest::default()
    };
    let (request, refused) = resolve_names(gateway, request).await;
    let applied = if refused.is_empty() {
        gateway.lock().apply(&request)?
    } else {
        Applied {
            refused,
            ..Applied::default()
        }
    };
    config.refused(path, &applied)?;
    Ok(applied)
}
