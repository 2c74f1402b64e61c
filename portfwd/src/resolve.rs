//! Names and their addresses, asked of the system's resolver.
//!
//! That is getaddrinfo with all that the machine's administrator has configured: `/etc/hosts`, `nsswitch.conf`,
//! `resolv.conf`. It waits as long as it likes, so it runs on threads of its own, and nobody who holds a lock waits for it.

use std::{collections::HashMap, net::IpAddr, time::Duration};

use tokio::{net::lookup_host, task::JoinSet, time::timeout};

use crate::{
    failure::{Failure, Kind, Result},
    ruleset::{Host, Listen, Refusal, RuleFamily, RuleSpec, RuleWords},
};

/// How long an answer may take. The resolver's own patience is often longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the resolver says of names: addresses in its order, or why there are none.
pub type Answers = HashMap<String, std::result::Result<Vec<IpAddr>, String>>;

/// Asks for names, all at the same time.
pub async fn resolve_all(names: impl IntoIterator<Item = String>) -> Answers {
    let mut lookups = JoinSet::new();
    for name in names {
        lookups.spawn(async move {
            let answer = addresses(&name).await;
            (name, answer)
        });
    }
    lookups.join_all().await.into_iter().collect()
}

async fn addresses(name: &str) -> std::result::Result<Vec<IpAddr>, String> {
    match timeout(PATIENCE, lookup_host((name, 0))).await {
        Ok(Ok(found)) => Ok(found.map(|endpoint| endpoint.ip()).collect()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_elapsed) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
    }
}

/// The words of a rule with the address of the name that its TARGET is, if it is one. Whatever else is wrong with them is
/// refused before anybody is asked.
pub async fn resolve(words: RuleWords) -> Result<RuleWords> {
    let words = RuleWords {
        resolved: None,
        ..words
    };
    let host = match RuleSpec::parse(&words) {
        Err(Refusal::Unresolved { host }) => host,
        Ok(_) => return Ok(words),
        Err(refusal) => return Err(refusal.into()),
    };
    RuleSpec::check(&words)?;
    let said = words.family.as_deref().map(str::parse).transpose()?;
    let of_listen = || -> Result<_, Refusal> {
        let listen: Listen = words.listen.parse()?;
        Ok(listen.address.map(RuleFamily::of))
    };
    let family: Option<RuleFamily> = match said {
        Some(family) => Some(family),
        None => of_listen()?,
    };
    let failed = |reason: &str| {
        Failure::new(Kind::Failed, format!("cannot resolve {host}: {reason}")).hint(format!(
            "`getent ahosts {host}` asks the same resolver; an address as TARGET needs none"
        ))
    };
    let found = addresses(&host).await.map_err(|error| failed(&error))?;
    let chosen = Host::new(&host, family).choose(&found, None);
    let address = chosen.ok_or_else(|| match family {
        Some(family) => failed(&format!("it has no {} address", family.word())),
        None => failed("it has no address"),
    })?;
    Ok(RuleWords {
        resolved: Some(address),
        ..words
    })
}
