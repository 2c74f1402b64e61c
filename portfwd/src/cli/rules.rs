//! `portfwd rules`.

use super::{
    output::{Align, Output, TRAFFIC, Table, name, traffic},
    source::{Remains, ask},
};
use crate::{control::protocol::RuleReport, failure::Result, instance::Instance};

pub const AFTER_HELP: &str = "\
TO-TARGET and TO-CLIENT count IP packets, exactly; BYTES are those of the IP packets. DRAINING, if there are any, are flows that
began before the rule was replaced and go on as they did.

Examples:
  portfwd rules
  portfwd -j rules | jq '.[] | select(.flows > 0)'";

pub async fn run(instance: &Instance, output: Output) -> Result<()> {
    let rules = ask(instance, "/v1/rules", Remains::rules).await?;
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
            ("FLOWS", Align::Right),
        ];
        let drains = rules.iter().any(|rule| rule.draining > 0);
        if drains {
            columns.push(("DRAINING", Align::Right));
        }
        columns.extend(TRAFFIC);
        let mut table = Table::new(columns);
        for rule in rules {
            let mut row = vec![
                rule.id.to_string(),
                name(rule.name.as_deref()),
                rule.proto.to_string(),
                rule.listen.clone(),
                rule.target.clone(),
                rule.flows.to_string(),
            ];
            if drains {
                row.push(rule.draining.to_string());
            }
            row.extend(traffic(rule.to_target, rule.to_client));
            table.row(row);
        }
        table.write(out, output.colour())
    })
}
