//! `portfwd flows`.

use super::{
    output::{Align, Output, TRAFFIC, Table, seconds, traffic},
    source::{Remains, ask},
};
use crate::{control::protocol::FlowReport, failure::Result, instance::Instance};

pub const AFTER_HELP: &str = "\
CLIENT dialled LISTEN and is served by TARGET, which takes it for SOURCE; RULE is the id of the rule.

Examples:
  portfwd flows
  portfwd -j flows | jq 'group_by(.client) | length'";

pub async fn run(instance: &Instance, output: Output) -> Result<()> {
    let flows = ask(instance, "/v1/flows", Remains::flows).await?;
    output.print(&flows, |out, flows: &Vec<FlowReport>| {
        if flows.is_empty() {
            return writeln!(out, "no flows");
        }
        let mut columns = vec![
            ("RULE", Align::Right),
            ("PROTO", Align::Left),
            ("CLIENT", Align::Left),
            ("LISTEN", Align::Left),
            ("TARGET", Align::Left),
            ("SOURCE", Align::Left),
            ("STATE", Align::Left),
            ("AGE", Align::Right),
            ("IDLE", Align::Right),
        ];
        columns.extend(TRAFFIC);
        let mut table = Table::new(columns);
        for flow in flows {
            let mut row = vec![
                flow.rule.to_string(),
                flow.proto.to_string(),
                flow.client.clone(),
                flow.listen.clone(),
                flow.target.clone(),
                flow.source.clone(),
                flow.state.clone(),
                seconds(flow.age_s),
                seconds(flow.idle_s),
            ];
            row.extend(traffic(flow.to_target, flow.to_client));
            table.row(row);
        }
        table.write(out, output.colour())
    })
}
