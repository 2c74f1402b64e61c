//! What was measured: as text, as JSON, and as bar charts.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;
use serde::Serialize;

use crate::targets::{self, Verdict};

/// Some measurements of the same thing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// The middle one.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
    /// The largest share of frames that did not arrive.
    pub loss: f64,
}

/// A loss that makes a figure worthless.
const UNTRUSTED: f64 = 0.000_5;

impl Figure {
    /// Of samples, each a value and the share that was lost; `None` without samples.
    pub fn of(samples: &[(f64, f64)]) -> Option<Self> {
        let mut values: Vec<f64> = samples.iter().map(|(value, _)| *value).collect();
        values.sort_by(f64::total_cmp);
        Some(Self {
            median: *values.get(values.len() / 2)?,
            least: *values.first()?,
            most: *values.last()?,
            loss: samples.iter().map(|(_, loss)| *loss).fold(0.0, f64::max),
        })
    }

    /// Whether everything that was sent arrived.
    pub fn is_trusted(&self) -> bool {
        self.loss <= UNTRUSTED
    }
}

/// A comparison: the same measurements of several contestants, interleaved.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// File name of its chart.
    pub name: &'static str,
    /// What was measured.
    pub title: String,
    /// Unit of the figures.
    pub unit: &'static str,
    /// The conditions.
    pub columns: Vec<String>,
    /// The contestants.
    pub rows: Vec<Row>,
    /// Row that the others are compared with, if they are.
    pub reference: Option<String>,
}

/// A contestant's figures, one for each condition.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// `None` where it does not take part.
    pub figures: Vec<Option<Figure>>,
}

impl Row {
    /// One without figures yet.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            figures: Vec::new(),
        }
    }
}

/// All tables of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Kernel release.
    pub kernel: String,
    /// Processor as it calls itself.
    pub processor: String,
    /// Version of portfwd.
    pub version: &'static str,
    /// The command line.
    pub command: String,
    /// Rounds of every measurement.
    pub rounds: usize,
    /// What was measured.
    pub tables: Vec<Table>,
    /// References that could not be measured here, and why.
    pub missing: Vec<String>,
    /// Contests that came to an end too early, and why.
    pub failed: Vec<String>,
    /// What it says about the targets.
    pub targets: Vec<Verdict>,
}

impl Report {
    /// An empty one about this machine.
    pub fn new(rounds: usize) -> Self {
        Self {
            kernel: nix::sys::utsname::uname().map_or_else(
                |_| "unknown".to_owned(),
                |name| name.release().to_string_lossy().into_owned(),
            ),
            processor: processor().unwrap_or_else(|| "unknown".to_owned()),
            version: env!("CARGO_PKG_VERSION"),
            command: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
            rounds,
            tables: Vec::new(),
            missing: Vec::new(),
            failed: Vec::new(),
            targets: Vec::new(),
        }
    }

    /// Says of a reference that it is not there.
    pub fn miss(&mut self, reference: &str, why: &anyhow::Error) {
        let line = format!("{reference}: {why:#}");
        eprintln!("missing: {line}");
        if !self.missing.contains(&line) {
            self.missing.push(line);
        }
    }

    /// Says of a contest that it could not be held to its end.
    pub fn fail(&mut self, contest: &str, why: &anyhow::Error) {
        let line = format!("{contest}: {why:#}");
        eprintln!("failed: {line}");
        self.failed.push(line);
    }

    /// Compares what was measured with the targets.
    pub fn judge(&mut self) {
        self.targets = targets::judge(&self.tables);
    }

    /// Writes `report.txt`, `report.json` and a chart for each table into a folder.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let writing = || format!("write the report into {}", folder.display());
        fs::create_dir_all(folder).with_context(writing)?;
        fs::write(folder.join("report.txt"), self.to_string()).with_context(writing)?;
        let json = serde_json::to_string_pretty(self)?;
        fs::write(folder.join("report.json"), json).with_context(writing)?;
        for table in &self.tables {
            let path = folder.join(table.name).with_extension("svg");
            table.draw(&path).with_context(writing)?;
        }
        Ok(())
    }
}

fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

impl Table {
    /// How a figure compares with the reference's.
    fn ratio(&self, column: usize, figure: &Figure) -> Option<f64> {
        let name = self.reference.as_ref()?;
        let reference = self.rows.iter().find(|row| row.name == *name)?;
        let reference = (*reference.figures.get(column)?)?;
        Some(figure.median / reference.median)
    }

    /// A group of bars for every condition, a bar for every contestant.
    fn draw(&self, path: &Path) -> Result<()> {
        const PALETTE: [RGBColor; 8] = [
            RGBColor(0x99, 0x99, 0x99),
            RGBColor(0x55, 0x55, 0x55),
            RGBColor(0x00, 0x72, 0xb2),
            RGBColor(0xe6, 0x9f, 0x00),
            RGBColor(0xd5, 0x5e, 0x00),
            RGBColor(0x00, 0x9e, 0x73),
            RGBColor(0xcc, 0x79, 0xa7),
            RGBColor(0x56, 0xb4, 0xe9),
        ];
        let tallest = self
            .rows
            .iter()
            .flat_map(|row| row.figures.iter().flatten())
            .map(|figure| figure.median)
            .fold(0.0, f64::max);
        let root = SVGBackend::new(path, (1000, 420)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(&self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..self.columns.len() as f64, 0.0..tallest * 1.1)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(2 * self.columns.len() + 1)
            .x_label_formatter(&|x| {
                // The middle of a group has its name.
                let column = x.floor();
                let name = self.columns.get(column as usize);
                match name {
                    Some(name) if (x - column - 0.5).abs() < 0.01 => name.clone(),
                    Some(_) | None => String::new(),
                }
            })
            .y_desc(self.unit)
            .draw()?;
        let width = 0.8 / self.rows.len() as f64;
        for (index, row) in self.rows.iter().enumerate() {
            let colour = PALETTE[index % PALETTE.len()];
            let bars = row
                .figures
                .iter()
                .enumerate()
                .filter_map(|(column, figure)| {
                    let left = column as f64 + 0.1 + width * index as f64;
                    let top = (*figure)?.median;
                    Some(Rectangle::new(
                        [(left, 0.0), (left + width * 0.9, top)],
                        colour.filled(),
                    ))
                });
            chart
                .draw_series(bars)?
                .label(&row.name)
                .legend(move |(x, y)| {
                    Rectangle::new([(x, y - 5), (x + 10, y + 5)], colour.filled())
                });
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .position(SeriesLabelPosition::UpperLeft)
            .draw()?;
        root.present()?;
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "portfwd {}, Linux {}, {}; bench {}; median of {} rounds (least - most), ratio",
            self.version, self.kernel, self.processor, self.command, self.rounds
        )?;
        for (what, lines) in [("missing", &self.missing), ("failed", &self.failed)] {
            for line in lines {
                writeln!(f, "{what}: {line}")?;
            }
        }
        for table in &self.tables {
            write!(f, "\n{table}")?;
        }
        if !self.targets.is_empty() {
            write!(
                f,
                "\nTargets; B the bare redirect, F the floor, N nftables DNAT\n\n{}",
                targets::text(&self.targets)
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.title, self.unit)?;
        match &self.reference {
            Some(reference) => writeln!(f, ", ratio to {reference}")?,
            None => writeln!(f)?,
        }
        for (column, condition) in self.columns.iter().enumerate() {
            writeln!(f, "  {condition}")?;
            for row in &self.rows {
                let Some(figure) = row.figures.get(column).copied().flatten() else {
                    continue;
                };
                write!(
                    f,
                    "    {:<20}{:>9.1} ({:.1} - {:.1})",
                    row.name, figure.median, figure.least, figure.most
                )?;
                if let Some(ratio) = self.ratio(column, &figure) {
                    write!(f, "   {ratio:.3}")?;
                }
                if !figure.is_trusted() {
                    write!(f, "   {:.2}% lost: not to be trusted", figure.loss * 100.0)?;
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_the_middle_of_its_samples_and_the_worst_of_their_losses() {
        assert_eq!(Figure::of(&[]), None);
        let figure = Figure::of(&[(3.0, 0.0), (1.0, 0.2), (2.0, 0.0)]).unwrap();
        assert_eq!((figure.median, figure.least, figure.most), (2.0, 1.0, 3.0));
        assert!(!figure.is_trusted());
    }

    #[test]
    fn a_table_is_printed_with_ratios_and_drawn() {
        let figure = |value| Figure::of(&[(value, 0.0)]);
        let row = |name: &str, values: [Option<Figure>; 2]| Row {
            name: name.into(),
            figures: values.into(),
        };
        let table = Table {
            name: "example",
            title: "Example".into(),
            unit: "ns per packet",
            columns: vec!["1 flow".into(), "2 flows".into()],
            rows: vec![
                row("reference", [figure(100.0), figure(200.0)]),
                row("portfwd", [figure(110.0), None]),
            ],
            reference: Some("reference".into()),
        };
        let text = table.to_string();
        assert!(text.contains("portfwd                 110.0 (110.0 - 110.0)   1.100"));
        let folder = tempfile::tempdir().unwrap();
        let mut report = Report::new(1);
        report.tables.push(table);
        report.write(folder.path()).unwrap();
        let svg = fs::read_to_string(folder.path().join("example.svg")).unwrap();
        for word in ["Example", "1 flow", "2 flows", "portfwd", "reference"] {
            assert!(svg.contains(word), "{word} is not in the chart");
        }
        let json: serde_json::Value =
            serde_json::from_slice(&fs::read(folder.path().join("report.json")).unwrap()).unwrap();
        assert_eq!(json["tables"][0]["rows"][0]["figures"][1]["median"], 200.0);
    }
}
