//! What portfwd is to reach, and whether a run's tables say that it does.

use std::fmt::Write as _;

use serde::Serialize;

use crate::report::Table;

/// Whether a target is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Outcome {
    /// Everything that it asks for was measured, and is so.
    Met,
    /// Something of it was measured, and is not so.
    Missed,
    /// Something of it was not measured, and the rest is so.
    Open,
}

/// A line of the table of targets.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// What is measured.
    pub what: &'static str,
    /// What is asked for.
    pub target: String,
    /// What was measured.
    pub measured: String,
    /// What follows.
    pub outcome: Outcome,
}

/// A figure of a run: table, row and column.
#[derive(Clone, Copy)]
struct Cell(&'static str, &'static str, &'static str);

/// What a quotient has to be.
#[derive(Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}
use Bound::{AtLeast, AtMost};

/// A figure, or how often another is contained in it, and what it has to be, in a unit.
struct Check {
    figure: Cell,
    over: Option<Cell>,
    bound: Bound,
    unit: &'static str,
}

struct Target {
    what: &'static str,
    checks: Vec<Check>,
}

const XDP: &str = "portfwd xdp";
const LIGHT: &str = "portfwd xdp, light";
const TC: &str = "portfwd tc";
const FLOOR: &str = "floor";
const REDIRECT: &str = "bare redirect";
const NFTABLES: &str = "nftables DNAT";
const ROUTING: &str = "kernel forwarding";
const PLAIN: &str = "plain routing";
const DAEMON: &str = "portfwd";

/// The time of one gateway in that of another.
fn ratio(
    table: &'static str,
    column: &'static str,
    [row, over]: [&'static str; 2],
    bound: Bound,
    unit: &'static str,
) -> Check {
    Check {
        figure: Cell(table, row, column),
        over: Some(Cell(table, over, column)),
        bound,
        unit,
    }
}

/// So much of the floor and of the bare redirect at most, and so many times faster than nftables, each if there is a number.
fn forwarding(
    table: &'static str,
    column: &'static str,
    floor: Option<f64>,
    redirect: Option<f64>,
    nftables: f64,
) -> Vec<Check> {
    let floor = floor.map(|most| ratio(table, column, [XDP, FLOOR], AtMost(most), "F"));
    let redirect = redirect.map(|most| ratio(table, column, [XDP, REDIRECT], AtMost(most), "B"));
    let nftables = ratio(
        table,
        column,
        [NFTABLES, XDP],
        AtLeast(nftables),
        "times as fast as N",
    );
    floor
        .into_iter()
        .chain(redirect)
        .chain([nftables])
        .collect()
}

fn figure(cell: Cell, bound: Bound, unit: &'static str) -> Check {
    Check {
        figure: cell,
        over: None,
        bound,
        unit,
    }
}

/// Rates of sockets against plain routing and nftables.
fn sockets(table: &'static str, column: &'static str, plain: f64, nftables: f64) -> Vec<Check> {
    vec![
        ratio(
            table,
            column,
            [TC, PLAIN],
            AtLeast(plain),
            "of plain routing",
        ),
        ratio(table, column, [TC, NFTABLES], AtLeast(nftables), "of N"),
    ]
}

fn ipv6(way: [&'static str; 2]) -> Check {
    let [v6, v4] = way;
    Check {
        figure: Cell("kinds", XDP, v6),
        over: Some(Cell("kinds", XDP, v4)),
        bound: AtMost(1.10),
        unit: "of IPv4",
    }
}

/// A million flows with light tracking against one, and against the bare redirect.
fn light(many: &'static str, one: &'static str) -> [Check; 2] {
    [
        Check {
            figure: Cell("light", LIGHT, many),
            over: Some(Cell("light", LIGHT, one)),
            bound: AtMost(1.05),
            unit: "of 1 flow",
        },
        ratio("light", many, [LIGHT, REDIRECT], AtMost(1.12), "B"),
    ]
}

/// All of them. B is the bare redirect, F the floor, N nftables DNAT.
fn targets() -> Vec<Target> {
    let target = |what, checks| Target { what, checks };
    let (f, b, n) = (Some(1.03), Some(1.15), 4.5);
    let daemon = |column, bound| figure(Cell("daemon", DAEMON, column), bound, "ms");
    vec![
        target(
            "XDP, established, IPv4 UDP, 1 flow",
            forwarding("flows", "1 flow", f, b, n),
        ),
        target(
            "XDP, IPv4 UDP, 1,024 flows",
            forwarding("flows", "1024 flows", f, b, n),
        ),
        target(
            "XDP, IPv4 UDP, 1,024 flows, back to the client",
            forwarding("kinds", "IPv4 UDP back", f, b, n),
        ),
        target(
            "XDP, IPv4 TCP, 1,024 flows",
            forwarding("kinds", "IPv4 TCP there", f, b, n),
        ),
        target(
            "XDP, IPv4 TCP, 1,024 flows, back to the client",
            forwarding("kinds", "IPv4 TCP back", f, b, n),
        ),
        target(
            "XDP, 131,072 flows in random order",
            forwarding("flows", "131072 flows", Some(1.05), None, 4.3),
        ),
        target(
            "XDP, 1,048,576 flows in random order",
            forwarding("flows", "1048576 flows", Some(1.05), None, 4.3),
        ),
        target(
            "IPv6: UDP there and back, TCP there and back",
            vec![
                ipv6(["IPv6 UDP there", "IPv4 UDP there"]),
                ipv6(["IPv6 UDP back", "IPv4 UDP back"]),
                ipv6(["IPv6 TCP there", "IPv4 TCP there"]),
                ipv6(["IPv6 TCP back", "IPv4 TCP back"]),
            ],
        ),
        target(
            "10,000 rules; a range of 65,535 ports; each of an established flow, and of new ones",
            ["10,000 rules", "a range of 65,535 ports"]
                .into_iter()
                .flat_map(|rules| ["established", "new"].map(|column| (rules, column)))
                .map(|(rules, column)| {
                    ratio(
                        "rules",
                        column,
                        [rules, "1 rule"],
                        AtMost(1.03),
                        "of 1 rule",
                    )
                })
                .collect(),
        ),
        target(
            "a new connection with every packet: UDP, SYN",
            vec![
                ratio(
                    "new",
                    "UDP",
                    [NFTABLES, XDP],
                    AtLeast(3.0),
                    "times as fast as N",
                ),
                ratio(
                    "new",
                    "SYN",
                    [NFTABLES, XDP],
                    AtLeast(3.0),
                    "times as fast as N",
                ),
            ],
        ),
        target(
            "`--track light`, 1,048,576 flows, there and back",
            [
                light("1048576 there", "1 there"),
                light("1048576 back", "1 back"),
            ]
            .into_iter()
            .flatten()
            .collect(),
        ),
        target(
            "stateless translation: light tracking, 1,048,576 flows and room for 2,048, there and back",
            ["1048576 there", "1048576 back"]
                .map(|column| ratio("stateless", column, [LIGHT, REDIRECT], AtMost(1.08), "B"))
                .into(),
        ),
        target(
            "TC, 1,024 flows",
            vec![
                ratio(
                    "flows",
                    "1024 flows",
                    [NFTABLES, TC],
                    AtLeast(1.4),
                    "times as fast as N",
                ),
                ratio(
                    "flows",
                    "1024 flows",
                    [TC, ROUTING],
                    AtMost(1.0),
                    "of kernel forwarding",
                ),
            ],
        ),
        target(
            "TC, 131,072 flows",
            vec![
                ratio(
                    "flows",
                    "131072 flows",
                    [NFTABLES, TC],
                    AtLeast(1.55),
                    "times as fast as N",
                ),
                ratio(
                    "flows",
                    "131072 flows",
                    [TC, ROUTING],
                    AtMost(1.0),
                    "of kernel forwarding",
                ),
            ],
        ),
        target(
            "sockets through TC: upload",
            sockets("sockets", "Upload", 1.03, 1.08),
        ),
        target(
            "sockets through TC: download",
            sockets("sockets", "Download", 1.03, 1.08),
        ),
        target(
            "sockets through TC: requests on kept connections",
            sockets("requests", "kept connections", 1.05, 1.15),
        ),
        target(
            "sockets through TC: a connection for each request",
            sockets("requests", "a connection each", 1.0, 1.12),
        ),
        target(
            "two directions on two cores",
            vec![Check {
                figure: Cell("cores", "portfwd xdp, two cores", "both directions"),
                over: Some(Cell("cores", "portfwd xdp, one core", "both directions")),
                bound: AtLeast(1.8),
                unit: "times one core",
            }],
        ),
        target(
            "kernel memory of an IPv4 connection in the connection table",
            vec![figure(
                Cell("connection", DAEMON, "IPv4"),
                AtMost(320.0),
                "bytes",
            )],
        ),
        target(
            "daemon: forwarding after a first start; after a restart",
            vec![
                daemon("first start, to the first answer", AtMost(300.0)),
                daemon("restart, until ready", AtMost(300.0)),
            ],
        ),
        target(
            "daemon: `add` at 10,000 rules, median of the command",
            vec![daemon("add beside them, command", AtMost(5.0))],
        ),
        target(
            "daemon: 10,000 rules applied",
            vec![daemon("apply of all rules", AtMost(500.0))],
        ),
        target(
            "daemon: sweep of 1,048,576 flows: new to it; again; expired",
            [
                "of flows that are new to it",
                "again",
                "of flows that have expired",
            ]
            .map(|column| figure(Cell("sweep", DAEMON, column), AtMost(500.0), "ms"))
            .into(),
        ),
        target(
            "daemon: resident memory with nothing, 10,000 rules, 8,192 flows, 1,048,576 flows",
            ["nothing", "10000 rules", "8192 flows", "1048576 flows"]
                .map(|column| {
                    figure(
                        Cell("daemon-memory", "portfwd, resident", column),
                        AtMost(20.0),
                        "MiB",
                    )
                })
                .into(),
        ),
        target(
            "daemon: idle",
            vec![figure(
                Cell("daemon-processor", DAEMON, "nothing"),
                AtMost(0.5),
                "ms of CPU a second",
            )],
        ),
    ]
}

/// Compares a run's tables with the targets. Those of which nothing was measured are left out.
pub fn judge(tables: &[Table]) -> Vec<Verdict> {
    targets()
        .iter()
        .filter_map(|target| target.judge(tables))
        .collect()
}

/// Verdicts as a table of Markdown.
pub fn text(verdicts: &[Verdict]) -> String {
    let mut text = String::from("| what | target | measured | |\n|---|---|---|---|\n");
    for Verdict {
        what,
        target,
        measured,
        outcome,
    } in verdicts
    {
        let outcome = match outcome {
            Outcome::Met => "met",
            Outcome::Missed => "missed",
            Outcome::Open => "not all measured",
        };
        // Writing to a String cannot fail.
        let _written = writeln!(text, "| {what} | {target} | {measured} | {outcome} |");
    }
    text
}

impl Target {
    fn judge(&self, tables: &[Table]) -> Option<Verdict> {
        let measured: Vec<_> = self
            .checks
            .iter()
            .map(|check| check.value(tables))
            .collect();
        if measured.iter().all(Option::is_none) {
            return None;
        }
        let is_missed =
            |(check, value): (&Check, &Option<f64>)| value.is_some_and(|value| !check.holds(value));
        let outcome = if self.checks.iter().zip(&measured).any(is_missed) {
            Outcome::Missed
        } else if measured.contains(&None) {
            Outcome::Open
        } else {
            Outcome::Met
        };
        let values = self.checks.iter().zip(&measured);
        let values = values.map(|(check, value)| match value {
            Some(value) => format!("{} {}", number(*value), check.unit),
            None => "-".to_owned(),
        });
        Some(Verdict {
            what: self.what,
            target: joined(self.checks.iter().map(Check::asked)),
            measured: joined(values),
            outcome,
        })
    }
}

/// What is said again is left out.
fn joined(words: impl Iterator<Item = String>) -> String {
    let mut words: Vec<_> = words.collect();
    if words.iter().all(|word| *word == words[0]) {
        words.truncate(1);
    }
    words.join(", ")
}

fn number(value: f64) -> String {
    if value < 10.0 {
        format!("{value:.3}")
    } else {
        format!("{value:.1}")
    }
}

impl Check {
    fn value(&self, tables: &[Table]) -> Option<f64> {
        let value = self.figure.value(tables)?;
        match self.over {
            Some(over) => Some(value / over.value(tables)?),
            None => Some(value),
        }
    }

    fn holds(&self, value: f64) -> bool {
        match self.bound {
            AtMost(most) => value <= most,
            AtLeast(least) => value >= least,
        }
    }

    fn asked(&self) -> String {
        match self.bound {
            AtMost(most) => format!("≤ {most} {}", self.unit),
            AtLeast(least) => format!("≥ {least} {}", self.unit),
        }
    }
}

impl Cell {
    fn value(self, tables: &[Table]) -> Option<f64> {
        let Self(table, row, column) = self;
        let table = tables.iter().find(|of| of.name == table)?;
        let column = table.columns.iter().position(|of| of == column)?;
        let row = table.rows.iter().find(|of| of.name == row)?;
        let figure = (*row.figures.get(column)?)?;
        Some(figure.median)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Figure, Row};

    fn table(rows: &[(&str, f64)]) -> Table {
        Table {
            name: "rules",
            title: String::new(),
            unit: "ns per packet",
            columns: vec!["established".into(), "new".into()],
            rows: rows
                .iter()
                .map(|(name, value)| Row {
                    name: (*name).into(),
                    figures: vec![Figure::of(&[(*value, 0.0)]); 2],
                })
                .collect(),
            reference: None,
        }
    }

    fn outcomes(rows: &[(&str, f64)]) -> Vec<Outcome> {
        let verdicts = judge(&[table(rows)]);
        verdicts.iter().map(|verdict| verdict.outcome).collect()
    }

    #[test]
    fn a_target_is_met_by_all_of_its_figures_and_missed_by_one() {
        let range = "a range of 65,535 ports";
        assert_eq!(outcomes(&[("1 rule", 100.0)]), []);
        assert_eq!(
            outcomes(&[("1 rule", 100.0), ("10,000 rules", 103.0)]),
            [Outcome::Open]
        );
        assert_eq!(
            outcomes(&[("1 rule", 100.0), ("10,000 rules", 103.0), (range, 90.0)]),
            [Outcome::Met]
        );
        assert_eq!(
            outcomes(&[("1 rule", 100.0), ("10,000 rules", 103.0), (range, 103.2)]),
            [Outcome::Missed]
        );
    }

    #[test]
    fn verdicts_are_lines_of_a_table() {
        let verdicts = judge(&[table(&[("1 rule", 100.0), ("10,000 rules", 120.0)])]);
        assert!(
            text(&verdicts)
                .contains("| ≤ 1.03 of 1 rule | 1.200 of 1 rule, 1.200 of 1 rule, -, - | missed |"),
            "{}",
            text(&verdicts)
        );
    }
}
