//! Days and hours at which a rule is open: `mon-fri 08:00-18:00 Europe/Berlin`.
//!
//! A window begins and ends on the clock on the wall of its zone. It is the stretch of time from the
//! one instant to the other, so where clocks are changed it is opened once and closed once: an hour
//! that is skipped moves a bound that lies in it to after the gap, an hour that comes twice means
//! the first of the two.

use std::{fmt, str::FromStr};

use jiff::{
    Timestamp, ToSpan,
    civil::{Date, Weekday},
    tz::TimeZone,
};

use super::Refusal;

/// Windows of a week in one time zone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Schedule {
    windows: Vec<Window>,
    /// A name of the IANA database; `None` for the machine's own zone.
    zone: Option<String>,
}

/// Hours of certain days. One that ends before it begins goes on into the next day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Window {
    days: Days,
    start: Minute,
    end: Minute,
}

/// A set of days: bit 0 is Monday.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Days(u8);

/// Minutes since midnight, 0 to 1,440.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Minute(u16);

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
const MIDNIGHT: Minute = Minute(24 * 60);
const EVERY_DAY: Days = Days(0b111_1111);

impl Schedule {
    /// Whether it is open at an instant.
    pub fn is_open(&self, now: Timestamp) -> bool {
        self.stretches(now)
            .iter()
            .any(|(start, end)| *start <= now && now < *end)
    }

    /// The next instant at which it may open or close.
    pub fn next_change(&self, now: Timestamp) -> Option<Timestamp> {
        self.stretches(now)
            .into_iter()
            .flat_map(|(start, end)| [start, end])
            .filter(|bound| *bound > now)
            .min()
    }

    /// All stretches that may hold an instant or be the next after it.
    fn stretches(&self, now: Timestamp) -> Vec<(Timestamp, Timestamp)> {
        let zone = self.time_zone();
        let today = now.to_zoned(zone.clone()).date();
        // A window of the day before may last into today; the longest pause is six days.
        let days = (-2..=8).filter_map(|day| today.checked_add(day.days()).ok());
        let stretch = |(date, window): (Date, Window)| {
            let start = instant(date, window.start, &zone)?;
            let end = if window.end > window.start {
                instant(date, window.end, &zone)?
            } else {
                instant(date.tomorrow().ok()?, window.end, &zone)?
            };
            (start < end).then_some((start, end))
        };
        days.flat_map(|date| {
            let of_day = |window: &&Window| window.days.has(date.weekday());
            let windows = self.windows.iter().filter(of_day);
            windows
                .filter_map(|window| stretch((date, *window)))
                .collect::<Vec<_>>()
        })
        .collect()
    }

    fn time_zone(&self) -> TimeZone {
        // A zone that is gone from the machine's database since the rule was read: better a rule
        // that opens at the wrong hour than none that is sure.
        self.zone.as_deref().map_or_else(TimeZone::system, |name| {
            TimeZone::get(name).unwrap_or(TimeZone::UTC)
        })
    }
}

/// When a wall clock shows a time of a date; the earlier one of two, after a gap.
fn instant(date: Date, minute: Minute, zone: &TimeZone) -> Option<Timestamp> {
    let (date, minute) = if minute == MIDNIGHT {
        (date.tomorrow().ok()?, Minute(0))
    } else {
        (date, minute)
    };
    let time = date.at((minute.0 / 60) as i8, (minute.0 % 60) as i8, 0, 0);
    Some(time.to_zoned(zone.clone()).ok()?.timestamp())
}

impl Days {
    fn has(self, day: Weekday) -> bool {
        self.0 & (1 << day.to_monday_zero_offset()) != 0
    }

    /// `mon`, `mon-fri`, `fri-mon`, `sat,sun` or `daily`.
    fn parse(text: &str) -> Option<Self> {
        if text == "daily" {
            return Some(EVERY_DAY);
        }
        let number = |name: &str| DAYS.iter().position(|day| *day == name);
        let mut days = 0;
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            let length = (last + 7 - first) % 7;
            for day in first..=first + length {
                days |= 1 << (day % 7);
            }
        }
        Some(Self(days))
    }
}

impl fmt::Display for Days {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == EVERY_DAY {
            return f.write_str("daily");
        }
        let has = |day: usize| day < 7 && self.0 & (1 << day) != 0;
        let (mut day, mut comma) = (0, "");
        while day < 7 {
            let length = (0..7).take_while(|more| has(day + more)).count();
            match length {
                0 => {}
                1 => write!(f, "{comma}{}", DAYS[day])?,
                _ => write!(f, "{comma}{}-{}", DAYS[day], DAYS[day + length - 1])?,
            }
            if length > 0 {
                comma = ",";
            }
            day += length.max(1);
        }
        Ok(())
    }
}

impl Minute {
    /// `HH:MM`, to 24:00.
    fn parse(text: &str) -> Option<Self> {
        let (hours, minutes) = text.split_once(':')?;
        let number = |text: &str| -> Option<u16> {
            let digits = text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| text.parse().ok())?
        };
        let (hours, minutes) = (number(hours)?, number(minutes)?);
        let minute = Self(hours * 60 + minutes);
        (minutes < 60 && minute <= MIDNIGHT).then_some(minute)
    }
}

impl fmt::Display for Minute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

impl FromStr for Window {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut words = text.split_whitespace();
        let (Some(days), Some(hours), None) = (words.next(), words.next(), words.next()) else {
            return Err(());
        };
        let (start, end) = hours.split_once('-').ok_or(())?;
        let window = Self {
            days: Days::parse(days).ok_or(())?,
            start: Minute::parse(start).ok_or(())?,
            end: Minute::parse(end).ok_or(())?,
        };
        // The same time twice would be nothing or a whole day, depending on the reader.
        (window.start != window.end && window.start < MIDNIGHT)
            .then_some(window)
            .ok_or(())
    }
}

impl FromStr for Schedule {
    type Err = Refusal;

    /// `DAYS HH:MM-HH:MM[; DAYS HH:MM-HH:MM …] [ZONE]`.
    fn from_str(text: &str) -> Result<Self, Refusal> {
        let illegal = || Refusal::IllegalSchedule {
            text: text.to_owned(),
        };
        let trimmed = text.trim();
        let (windows, zone) = match trimmed.rsplit_once(char::is_whitespace) {
            Some((windows, last)) if !last.contains(':') => (windows, Some(last)),
            Some(_) | None => (trimmed, None),
        };
        if let Some(zone) = zone {
            TimeZone::get(zone).map_err(|_| Refusal::UnknownTimeZone {
                text: zone.to_owned(),
            })?;
        }
        let windows = windows
            .split(';')
            .map(str::parse)
            .collect::<Result<Vec<Window>, ()>>();
        Ok(Self {
            windows: windows.map_err(|()| illegal())?,
            zone: zone.map(str::to_owned),
        })
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, Window { days, start, end }) in self.windows.iter().enumerate() {
            let separator = if number == 0 { "" } else { "; " };
            write!(f, "{separator}{days} {start}-{end}")?;
        }
        match &self.zone {
            Some(zone) => write!(f, " {zone}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn schedule(text: &str) -> Schedule {
        text.parse().unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    /// The instants at which a schedule opens (`true`) or closes, between two instants.
    fn changes(schedule: &Schedule, from: &str, to: &str) -> Vec<(String, bool)> {
        let (mut now, end) = (at(from), at(to));
        let mut is_open = schedule.is_open(now);
        let mut changes = Vec::new();
        while let Some(next) = schedule.next_change(now).filter(|next| *next <= end) {
            now = next;
            if schedule.is_open(now) != is_open {
                is_open = !is_open;
                changes.push((now.to_string(), is_open));
            }
        }
        changes
    }

    fn expected(list: &[(&str, bool)]) -> Vec<(String, bool)> {
        list.iter()
            .map(|(at, open)| ((*at).to_owned(), *open))
            .collect()
    }

    #[test]
    fn office_hours_are_those_of_the_zone_in_summer_and_winter() {
        let office = schedule("mon-fri 08:00-18:00 Europe/Berlin");
        assert_eq!(
            changes(&office, "2026-03-26T00:00:00Z", "2026-03-31T00:00:00Z"),
            expected(&[
                ("2026-03-26T07:00:00Z", true),
                ("2026-03-26T17:00:00Z", false),
                ("2026-03-27T07:00:00Z", true),
                ("2026-03-27T17:00:00Z", false),
                // Clocks went forward on Sunday.
                ("2026-03-30T06:00:00Z", true),
                ("2026-03-30T16:00:00Z", false),
            ])
        );
    }

    #[test]
    fn a_night_belongs_to_the_day_on_which_it_begins() {
        let night = schedule("fri 22:00-06:00 UTC");
        assert_eq!(
            changes(&night, "2026-11-19T00:00:00Z", "2026-11-23T00:00:00Z"),
            expected(&[
                ("2026-11-20T22:00:00Z", true),
                ("2026-11-21T06:00:00Z", false)
            ])
        );
        assert!(night.is_open(at("2026-11-21T05:59:59Z")));
        assert!(!night.is_open(at("2026-11-20T05:59:59Z")));
    }

    #[test]
    fn an_hour_that_comes_twice_opens_and_closes_once() {
        // 25 October 2026, Berlin: 03:00 becomes 02:00.
        let early = schedule("sun 01:30-02:30 Europe/Berlin");
        assert_eq!(
            changes(&early, "2026-10-24T12:00:00Z", "2026-10-26T00:00:00Z"),
            expected(&[
                ("2026-10-24T23:30:00Z", true),
                ("2026-10-25T00:30:00Z", false)
            ])
        );
        let late = schedule("sun 02:30-03:30 Europe/Berlin");
        assert_eq!(
            changes(&late, "2026-10-24T12:00:00Z", "2026-10-26T00:00:00Z"),
            expected(&[
                ("2026-10-25T00:30:00Z", true),
                ("2026-10-25T02:30:00Z", false)
            ])
        );
    }

    #[test]
    fn an_hour_that_is_skipped_moves_what_begins_in_it() {
        // 29 March 2026, Berlin: 02:00 becomes 03:00.
        let bound = schedule("sun 02:30-04:00 Europe/Berlin");
        assert_eq!(
            changes(&bound, "2026-03-28T12:00:00Z", "2026-03-30T00:00:00Z"),
            expected(&[
                ("2026-03-29T01:30:00Z", true),
                ("2026-03-29T02:00:00Z", false)
            ])
        );
        // All of it is skipped: begin and end move alike.
        let inside = schedule("sun 02:10-02:20 Europe/Berlin");
        assert_eq!(
            changes(&inside, "2026-03-28T12:00:00Z", "2026-03-30T00:00:00Z"),
            expected(&[
                ("2026-03-29T01:10:00Z", true),
                ("2026-03-29T01:20:00Z", false)
            ])
        );
    }

    #[test]
    fn windows_that_touch_are_one() {
        let always = schedule("daily 00:00-24:00 America/New_York");
        assert_eq!(
            changes(&always, "2026-10-20T00:00:00Z", "2026-11-20T00:00:00Z"),
            []
        );
        assert!(always.is_open(at("2026-11-01T05:30:00Z")));
        let parts = schedule("mon-fri 08:00-12:00; mon-fri 12:00-17:00 UTC");
        assert_eq!(
            changes(&parts, "2026-11-23T00:00:00Z", "2026-11-23T23:00:00Z"),
            expected(&[
                ("2026-11-23T08:00:00Z", true),
                ("2026-11-23T17:00:00Z", false)
            ])
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in [
            "",
            "mon",
            "08:00-18:00",
            "mon 08:00",
            "mon 8:00-18:00",
            "mon 08:00-24:01",
            "mon 24:00-08:00",
            "mon 08:60-09:00",
            "mon 08:00-08:00",
            "mo 08:00-18:00",
            "mon-fri- 08:00-18:00",
            "mon,, 08:00-18:00",
            "mon 08:00-18:00;",
            "mon 08:00-18:00 tue 08:00-18:00",
            "Europe/Berlin",
        ] {
            assert!(text.parse::<Schedule>().is_err(), "{text:?}");
        }
        assert_eq!(
            "mon 08:00-18:00 Mars/Olympus".parse::<Schedule>(),
            Err(Refusal::UnknownTimeZone {
                text: "Mars/Olympus".into()
            })
        );
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(
            windows in prop::collection::vec((1..128_u8, 0..1440_u16, 0..=1440_u16), 1..4), zone in any::<bool>(),
        ) {
            let windows = windows.into_iter().filter(|(_, start, end)| start != end);
            let windows: Vec<_> = windows.map(|(days, start, end)| Window {
                days: Days(days),
                start: Minute(start),
                end: Minute(end),
            }).collect();
            prop_assume!(!windows.is_empty());
            let schedule = Schedule { windows, zone: zone.then(|| "Asia/Kathmandu".to_owned()) };
            prop_assert_eq!(schedule.to_string().parse(), Ok(schedule));
        }

        /// Whether it is open changes only at the instants that are foretold.
        #[test]
        fn nothing_changes_but_when_it_is_foretold(
            day in 0..400_i64, minutes in prop::collection::vec(0..20_000_i64, 1..10),
            start in 0..1440_u16, end in 0..=1440_u16, days in 1..128_u8,
            zone in prop::sample::select(vec!["Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "UTC"]),
        ) {
            prop_assume!(start != end);
            let window = Window { days: Days(days), start: Minute(start), end: Minute(end) };
            let schedule = Schedule { windows: vec![window], zone: Some(zone.to_owned()) };
            let base = at("2026-01-01T00:00:00Z").as_second() + day * 86_400;
            for minute in minutes {
                let now = Timestamp::from_second(base + minute * 60).unwrap();
                let next = schedule.next_change(now).unwrap();
                prop_assert!(next > now);
                let just_before = Timestamp::from_second(next.as_second() - 1).unwrap();
                if just_before > now {
                    prop_assert_eq!(schedule.is_open(just_before), schedule.is_open(now));
                }
            }
        }
    }
}
