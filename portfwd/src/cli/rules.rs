//! `portfwd rules`.

use clap::Args;

use super::{
    output::{Align, Output, TRAFFIC, Table, name, traffic},
    source::{Remains, ask},
};
use crate::{
    control::protocol::{LimitsReport, RuleReport},
    failure::Result,
    instance::Instance,
    ruleset::Track,
};

const AFTER_HELP: &str = "\
SOURCE is what the target sees instead of clients, - if it sees themselves.
TO-TARGET and TO-CLIENT count IP packets, exactly; BYTES are those of the IP packets. DRAINING, if there are any, are flows that
began before the rule was replaced and go on as they did. REFUSED counts packets beyond one of the rule's LIMITS; what is said of each is for each source.
TRACK is there if a rule has light tracking: its FLOWS are those that some of their packets have told of.

Examples:
  portfwd rules
  portfwd rules --tag shop
  portfwd -j rules | jq '.[] | select(.flows > 0)'";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// Only rules that bear this tag; may be given several times
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
}

/// Whether packets find a rule, in a word.
fn standing(rule: &RuleReport) -> &'static str {
    match (rule.enabled, rule.open) {
        (false, _) => "disabled",
        (true, false) => "closed",
        (true, true) => "open",
    }
}

pub async fn run(instance: &Instance, output: Output, arguments: &Arguments) -> Result<()> {
    let mut rules: Vec<RuleReport> = ask(instance, "/v1/rules", Remains::rules).await?;
    let tags = &arguments.tags;
    rules.retain(|rule| tags.is_empty() || rule.tags.iter().any(|tag| tags.contains(tag)));
    output.print(&rules, |out, rules: &Vec<RuleReport>| {
        if rules.is_empty() {
            return writeln!(
                out,
                "no rules; `{} add tcp 8080 10.0.0.2:80` would add one",
                instance.command()
            );
        }
        let mut columns = vec![
            ("ID", Align::Right),
            ("NAME", Align::Left),
            ("PROTO", Align::Left),
            ("LISTEN", Align::Left),
            ("TARGET", Align::Left),
            ("SOURCE", Align::Left),
            ("FLOWS", Align::Right),
        ];
        let drains = rules.iter().any(|rule| rule.draining > 0);
        if drains {
            columns.push(("DRAINING", Align::Right));
        }
        let stands = rules.iter().any(|rule| !rule.open);
        if stands {
            columns.push(("STATE", Align::Left));
        }
        let ends = rules.iter().any(|rule| rule.expires.is_some());
        if ends {
            columns.push(("EXPIRES", Align::Left));
        }
        let is_light = rules.iter().any(|rule| rule.track != FULL);
        if is_light {
            columns.push(("TRACK", Align::Left));
        }
        let is_restricted = rules.iter().any(|rule| sources(rule) != EVERYBODY);
        if is_restricted {
            columns.push(("SOURCES", Align::Left));
        }
        let has_exceptions = rules.iter().any(|rule| !rule.except.is_empty());
        if has_exceptions {
            columns.push(("EXCEPT", Align::Left));
        }
        let is_limited = rules.iter().any(|rule| rule.limits.is_some());
        if is_limited {
            columns.extend([("LIMITS", Align::Left), ("REFUSED", Align::Right)]);
        }
        columns.extend(TRAFFIC);
        let mut table = Table::new(columns);
        for rule in rules {
            let mut row = vec![
                rule.id.to_string(),
                name(rule.name.as_deref()),
                rule.proto.to_string(),
                rule.listen.clone(),
                match &rule.host {
                    Some(host) => format!("{} at {}", host.name, rule.target),
                    None => rule.target.clone(),
                },
                name(rule.source.as_deref()),
                rule.flows.to_string(),
            ];
            if drains {
                row.push(rule.draining.to_string());
            }
            if stands {
                row.push(standing(rule).to_owned());
            }
            if ends {
                row.push(name(rule.expires.as_deref()));
            }
            if is_light {
                row.push(rule.track.clone());
            }
            if is_restricted {
                row.push(sources(rule));
            }
            if has_exceptions {
                row.push(exceptions(rule));
            }
            if is_limited {
                row.extend(limits(rule.limits.as_ref()));
            }
            row.extend(traffic(rule.to_target, rule.to_client));
            table.row(row);
        }
        table.write(out, output.colour())?;
        for rule in rules {
            if let Some(error) = rule.host.as_ref().and_then(|host| host.error.as_ref()) {
                writeln!(out, "rule {} goes on to {}: {error}", rule.id, rule.target)?;
            }
        }
        Ok(())
    })
}

/// What a rule leaves to the gateway.
fn exceptions(rule: &RuleReport) -> String {
    match rule.except.as_slice() {
        [] => "-".to_owned(),
        exceptions => exceptions.join(", "),
    }
}

/// How rules are tracked unless they say otherwise.
const FULL: &str = Track::Full.word();

/// What the table says of a rule for everybody.
const EVERYBODY: &str = "all";

/// The limits of a rule, and how many packets they have refused.
fn limits(limits: Option<&LimitsReport>) -> [String; 2] {
    let Some(limits) = limits else {
        return ["-".to_owned(), "-".to_owned()];
    };
    let flows = |most: Option<u32>| most.map(|most| format!("{most} flows"));
    let each = |said: Option<String>| said.map(|said| format!("{said} each"));
    let said = [
        limits.rate.clone(),
        each(limits.rate_per_source.clone()),
        flows(limits.max_flows),
        each(flows(limits.max_flows_per_source)),
    ];
    let said: Vec<_> = said.into_iter().flatten().collect();
    [said.join(", "), limits.refused.to_string()]
}

/// How many prefixes may use a rule, and how many may not.
fn sources(rule: &RuleReport) -> String {
    let count = |list: &Option<Vec<String>>, what| {
        let prefixes = list.as_ref()?.len();
        Some(format!("{prefixes} {what}"))
    };
    let parts = [
        count(&rule.from, "allowed"),
        count(&rule.not_from, "denied"),
    ];
    let said: Vec<_> = parts.into_iter().flatten().collect();
    if said.is_empty() {
        EVERYBODY.to_owned()
    } else {
        said.join(", ")
    }
}
