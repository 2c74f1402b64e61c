//! How answers are printed: aligned columns or JSON; colour only on a terminal, and never with
//! `NO_COLOR`.

use std::{
    env,
    io::{self, IsTerminal, Write},
};

use serde::Serialize;

use crate::{
    control::protocol::Traffic,
    failure::{Failure, Result},
};

/// Where answers go, and how.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
    colour: bool,
}

/// How a piece of text stands out on a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// A heading.
    Bold,
    /// All is well.
    Good,
    /// Something is wrong.
    Bad,
}

/// On which side of its column a cell stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Aligned columns under a heading.
#[derive(Debug)]
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Output {
    /// Standard output.
    pub fn stdout(json: bool) -> Self {
        let colour_is_wanted = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self {
            json,
            colour: io::stdout().is_terminal() && colour_is_wanted,
        }
    }

    /// Whether to colour.
    pub fn colour(self) -> bool {
        self.colour
    }

    /// Whether JSON was asked for.
    pub fn is_json(self) -> bool {
        self.json
    }

    /// Prints an answer: as JSON, or as `text` writes it.
    pub fn print<T: Serialize>(
        self,
        answer: &T,
        text: impl FnOnce(&mut dyn Write, &T) -> io::Result<()>,
    ) -> Result<()> {
        let mut out = io::BufWriter::new(io::stdout().lock());
        let written = if self.json {
            serde_json::to_writer(&mut out, answer)
                .map_err(io::Error::from)
                .and_then(|()| writeln!(out))
        } else {
            text(&mut out, answer)
        };
        match written.and_then(|()| out.flush()) {
            // The reader has seen enough: `portfwd flows | head`.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other.map_err(|error| Failure::during("print", &error)),
        }
    }
}

impl Style {
    /// The text with its style, if there is colour.
    pub fn paint(self, text: &str, colour: bool) -> String {
        let code = match self {
            Self::Bold => "1",
            Self::Good => "32",
            Self::Bad => "31",
        };
        if colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

impl Table {
    /// A table without rows.
    pub fn new(columns: impl Into<Vec<(&'static str, Align)>>) -> Self {
        Self {
            columns: columns.into(),
            rows: Vec::new(),
        }
    }

    /// Adds a row, a cell per column.
    pub fn row(&mut self, cells: impl Into<Vec<String>>) {
        self.rows.push(cells.into());
    }

    /// Writes it, two blanks between columns, none at the end of a line.
    pub fn write(&self, out: &mut dyn Write, colour: bool) -> io::Result<()> {
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<_> = self
            .columns
            .iter()
            .enumerate()
            .map(|(i, (name, _))| width(i).max(name.len()))
            .collect();
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let padded = cells.zip(&self.columns).zip(&widths).map(
                |((cell, (_, align)), width)| match align {
                    Align::Left => format!("{cell:<width$}"),
                    Align::Right => format!("{cell:>width$}"),
                },
            );
            padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        let heading = line(&mut self.columns.iter().map(|(name, _)| *name));
        writeln!(out, "{}", Style::Bold.paint(&heading, colour))?;
        for row in &self.rows {
            writeln!(out, "{}", line(&mut row.iter().map(String::as_str)))?;
        }
        Ok(())
    }
}

/// Bytes for people: `999 B`, `1.5 KiB`, `12.3 GiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64;
    let mut unit = "B";
    for larger in UNITS {
        // 1023.95 would print as 1024.0.
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    format!("{value:.1} {unit}")
}

/// Seconds for people: `0.4s`, `59s`, `3m20s`, `2h05m`, `9d04h`.
pub fn seconds(seconds: f64) -> String {
    if seconds < 9.95 {
        return format!("{seconds:.1}s");
    }
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole}s"),
        60..3_600 => format!("{}m{:02}s", whole / 60, whole % 60),
        3_600..86_400 => format!("{}h{:02}m", whole / 3_600, whole / 60 % 60),
        86_400.. => format!("{}d{:02}h", whole / 86_400, whole / 3_600 % 24),
    }
}

/// The cells of both directions: packets and bytes to the target, then to the client.
pub fn traffic(to_target: Traffic, to_client: Traffic) -> [String; 4] {
    [
        to_target.packets.to_string(),
        bytes(to_target.bytes),
        to_client.packets.to_string(),
        bytes(to_client.bytes),
    ]
}

/// The columns of [`traffic`].
pub const TRAFFIC: [(&str, Align); 4] = [
    ("TO-TARGET", Align::Right),
    ("BYTES", Align::Right),
    ("TO-CLIENT", Align::Right),
    ("BYTES", Align::Right),
];

/// A name, or a dash.
pub fn name(name: Option<&str>) -> String {
    name.unwrap_or("-").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let mut table = Table::new([
            ("ID", Align::Right),
            ("NAME", Align::Left),
            ("FLOWS", Align::Right),
            ("STATE", Align::Left),
        ]);
        table.row(["1".into(), "web".into(), "12345678".into(), "up".into()]);
        table.row(["10".into(), "-".into(), "0".into(), String::new()]);
        let mut plain = Vec::new();
        table.write(&mut plain, false).unwrap();
        assert_eq!(
            String::from_utf8(plain).unwrap(),
            "ID  NAME     FLOWS  STATE\n 1  web   12345678  up\n10  -            0\n"
        );
        let mut coloured = Vec::new();
        table.write(&mut coloured, true).unwrap();
        assert!(
            String::from_utf8(coloured)
                .unwrap()
                .starts_with("\x1b[1mID  NAME     FLOWS  STATE\x1b[0m\n 1")
        );
    }

    #[test]
    fn numbers_are_readable() {
        for (value, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1_048_575, "1.0 MiB"),
            (104_857_600, "100.0 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(value), text);
        }
        for (value, text) in [
            (0.04, "0.0s"),
            (9.94, "9.9s"),
            (9.96, "10s"),
            (59.4, "59s"),
            (59.6, "1m00s"),
            (3_661.0, "1h01m"),
            (90_000.0, "1d01h"),
        ] {
            assert_eq!(seconds(value), text);
        }
    }
}
