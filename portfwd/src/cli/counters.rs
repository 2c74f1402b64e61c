//! `portfwd counters`.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use super::{
    output::{Align, Output, Style, TRAFFIC, Table, traffic},
    source::{Remains, ask},
};
use crate::{
    control::protocol::{CountersReport, PortReport},
    failure::Result,
    instance::Instance,
};

pub const AFTER_HELP: &str = "\
Ports are listed once they have seen a packet. With -j every reason is there, also at 0.

  drops     packets refused
  passes    packets left to the kernel, bit for bit
  events    what else happened to packets that were forwarded

Examples:
  portfwd counters
  portfwd -j counters | jq .drops";

pub async fn run(instance: &Instance, output: Output) -> Result<()> {
    let counters = ask(instance, "/v1/counters", Remains::counters).await?;
    output.print(
        &counters,
        |out,
         CountersReport {
             ports,
             drops,
             passes,
             events,
         }| {
            write_ports(out, ports, output.colour())?;
            for (title, reasons) in [("drops", drops), ("passes", passes), ("events", events)] {
                writeln!(out)?;
                write_reasons(out, title, reasons, output.colour())?;
            }
            Ok(())
        },
    )
}

fn write_ports(out: &mut dyn Write, ports: &[PortReport], colour: bool) -> io::Result<()> {
    if ports.is_empty() {
        return writeln!(out, "no port has seen a packet");
    }
    let mut columns = vec![
        ("RULE", Align::Right),
        ("PROTO", Align::Left),
        ("PORT", Align::Right),
    ];
    columns.extend(TRAFFIC);
    let mut table = Table::new(columns);
    for port in ports {
        let mut row = vec![
            port.rule.to_string(),
            port.proto.to_string(),
            port.port.to_string(),
        ];
        row.extend(traffic(port.to_target, port.to_client));
        table.row(row);
    }
    table.write(out, colour)
}

fn write_reasons(
    out: &mut dyn Write,
    title: &str,
    reasons: &BTreeMap<String, u64>,
    colour: bool,
) -> io::Result<()> {
    let counted: Vec<_> = reasons.iter().filter(|(_, count)| **count > 0).collect();
    if counted.is_empty() {
        return writeln!(out, "{}: none", Style::Bold.paint(title, colour));
    }
    writeln!(out, "{}:", Style::Bold.paint(title, colour))?;
    let width = counted
        .iter()
        .map(|(name, _)| name.len())
        .max()
        .unwrap_or(0);
    for (name, count) in counted {
        writeln!(out, "  {name:<width$}  {count}")?;
    }
    Ok(())
}
