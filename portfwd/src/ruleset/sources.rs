//! Who may use a rule: `--from` and `--not-from`.
//!
//! The longest prefix that names an address decides. An address that no prefix names is let in, unless there is a `--from`.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use portfwd_common::{
    abi::{Admission, SourceKey},
    net::{Family, Ipv6},
};
use thiserror::Error;

/// The sources that a rule lets in and keeps out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Sources {
    prefixes: BTreeMap<IpNet, Admission>,
}

pub use crate::bpf::SourcePrefix;

/// What SOURCES is to hold under a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceEntry {
    /// The key.
    pub prefix: SourcePrefix,
    /// `None` to remove the key.
    pub admission: Option<Admission>,
}

/// Why lists of sources are refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SourceRefusal {
    /// Not a prefix.
    #[error("{option} {text:?} is not an address or a prefix")]
    Illegal {
        /// The option.
        option: &'static str,
        /// As given.
        text: String,
    },
    /// Bits behind the prefix length.
    #[error("{option} {given} has bits set behind its prefix length")]
    HostBits {
        /// The option.
        option: &'static str,
        /// As given.
        given: IpNet,
    },
    /// Both lists name it.
    #[error("--from and --not-from both name {prefix}")]
    Contradiction {
        /// The prefix.
        prefix: IpNet,
    },
    /// Nothing that the rule can meet.
    #[error("{option} names no {family} prefix, and the rule is {family}")]
    OtherFamily {
        /// The option.
        option: &'static str,
        /// Of the rule.
        family: &'static str,
    },
    /// A file of prefixes cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    File {
        /// Behind the `@`.
        path: PathBuf,
        /// Why.
        error: String,
    },
    /// A rule that nobody may use, or a list that says nothing.
    #[error("{option} names no prefix at all")]
    Empty {
        /// The option.
        option: &'static str,
    },
}

/// The name of the option that lets in.
const FROM: &str = "--from";
/// The name of the option that keeps out.
const NOT_FROM: &str = "--not-from";

impl Sources {
    /// From the prefixes of both lists, for a rule of a family.
    pub fn parse(
        from: Option<&[String]>,
        not_from: Option<&[String]>,
        family: Family,
    ) -> Result<Self, SourceRefusal> {
        let mut prefixes = BTreeMap::new();
        for (option, list, admission) in [
            (FROM, from, Admission::Allowed),
            (NOT_FROM, not_from, Admission::Denied),
        ] {
            let Some(list) = list else { continue };
            if list.is_empty() {
                return Err(SourceRefusal::Empty { option });
            }
            for text in list {
                let prefix = prefix(option, text)?;
                if prefixes.insert(prefix, admission) == Some(opposite(admission)) {
                    return Err(SourceRefusal::Contradiction { prefix });
                }
            }
            let meets = |(prefix, found): (&IpNet, &Admission)| {
                *found == admission && is_of(prefix, family)
            };
            if !prefixes.iter().any(meets) {
                return Err(SourceRefusal::OtherFamily {
                    option,
                    family: match family {
                        Family::V4 => "IPv4",
                        Family::V6 => "IPv6",
                    },
                });
            }
        }
        Ok(Self { prefixes })
    }

    /// Whether everybody may use the rule.
    pub fn is_empty(&self) -> bool {
        self.prefixes.is_empty()
    }

    /// The prefixes of `--from`, sorted; `None` without the option.
    pub fn from(&self) -> Option<Vec<String>> {
        self.words(Admission::Allowed)
    }

    /// The prefixes of `--not-from`, sorted; `None` without the option.
    pub fn not_from(&self) -> Option<Vec<String>> {
        self.words(Admission::Denied)
    }

    /// How many prefixes one of the lists has.
    pub fn count(&self, admission: Admission) -> usize {
        self.prefixes
            .values()
            .filter(|found| **found == admission)
            .count()
    }

    fn words(&self, admission: Admission) -> Option<Vec<String>> {
        let words: Vec<_> = self
            .prefixes
            .iter()
            .filter(|(_, found)| **found == admission)
            .map(|(prefix, _)| prefix.to_string())
            .collect();
        (!words.is_empty()).then_some(words)
    }

    /// What SOURCES is to hold for a rule of a family, under the number of a list. Prefixes of the other family meet nothing.
    pub fn entries(&self, list: u32, family: Family) -> Vec<SourceEntry> {
        if self.is_empty() {
            return Vec::new();
        }
        let rest = if self.count(Admission::Allowed) == 0 {
            Admission::Allowed
        } else {
            Admission::Denied
        };
        let entry = |address: Ipv6, length: u8, admission| SourceEntry {
            prefix: SourcePrefix {
                length: SourceKey::LIST_BITS + u32::from(length),
                key: SourceKey::new(list, address),
            },
            admission: Some(admission),
        };
        let mut entries: Vec<_> = self
            .prefixes
            .iter()
            .filter(|(prefix, _)| is_of(prefix, family))
            .map(|(prefix, admission)| entry(prefix.addr().into(), prefix.prefix_len(), *admission))
            .collect();
        // A prefix that names everybody leaves no rest.
        let everybody = entry(Ipv6::UNSPECIFIED, 0, rest);
        if !entries.iter().any(|e| e.prefix == everybody.prefix) {
            entries.push(everybody);
        }
        entries
    }
}

impl SourceRefusal {
    /// The key of a file that it is about; empty if it is about both.
    pub fn key(&self) -> &'static str {
        let option = match self {
            Self::Illegal { option, .. }
            | Self::HostBits { option, .. }
            | Self::OtherFamily { option, .. }
            | Self::Empty { option } => *option,
            Self::Contradiction { .. } => NOT_FROM,
            Self::File { .. } => return "",
        };
        if option == FROM { "from" } else { "not_from" }
    }

    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Illegal { .. } => {
                "for example 203.0.113.0/24, 198.51.100.7, 2001:db8::/32 or @FILE".into()
            }
            Self::HostBits { given, .. } => format!("{} is the network", given.trunc()),
            Self::Contradiction { .. } => "leave it in one of them".into(),
            Self::OtherFamily { .. } => {
                "a rule is IPv4 or IPv6 as its TARGET is; it meets no source of the other family"
                    .into()
            }
            Self::File { .. } => "a file has one prefix a line; # begins a comment".into(),
            Self::Empty { .. } => "leave the option out to let everybody in".into(),
        }
    }
}

const fn opposite(admission: Admission) -> Admission {
    match admission {
        Admission::Allowed => Admission::Denied,
        Admission::Denied => Admission::Allowed,
    }
}

const fn is_of(prefix: &IpNet, family: Family) -> bool {
    match family {
        Family::V4 => matches!(prefix, IpNet::V4(_)),
        Family::V6 => matches!(prefix, IpNet::V6(_)),
    }
}

fn prefix(option: &'static str, text: &str) -> Result<IpNet, SourceRefusal> {
    let illegal = || SourceRefusal::Illegal {
        option,
        text: text.to_owned(),
    };
    let given = match text.parse::<IpAddr>() {
        Ok(address) => IpNet::from(address),
        Err(_) => text.parse::<IpNet>().map_err(|_| illegal())?,
    };
    if given.addr() != given.network() {
        return Err(SourceRefusal::HostBits { option, given });
    }
    Ok(given)
}

/// The prefixes of a list as the operator writes it: separated by commas, `@FILE` standing for the prefixes in a file, one a
/// line or several. `None` without the option.
pub fn expand(lists: &[String]) -> Result<Option<Vec<String>>, SourceRefusal> {
    expand_with(lists, |path| fs::read_to_string(path))
}

fn expand_with(
    lists: &[String],
    read: impl Fn(&Path) -> io::Result<String>,
) -> Result<Option<Vec<String>>, SourceRefusal> {
    if lists.is_empty() {
        return Ok(None);
    }
    let mut prefixes = Vec::new();
    for word in lists.iter().flat_map(|list| list.split(',')).map(str::trim) {
        let Some(path) = word.strip_prefix('@') else {
            prefixes.push(word.to_owned());
            continue;
        };
        let path = Path::new(path);
        let text = read(path).map_err(|error| SourceRefusal::File {
            path: path.to_owned(),
            error: error.to_string(),
        })?;
        let lines = text
            .lines()
            .map(|line| line.split_once('#').map_or(line, |(before, _)| before));
        let words = lines.flat_map(|line| line.split([',', ' ', '\t']));
        prefixes.extend(words.filter(|word| !word.is_empty()).map(str::to_owned));
    }
    Ok(Some(prefixes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    fn parse(from: &str, not_from: &str, family: Family) -> Result<Sources, SourceRefusal> {
        let option = |text: &str| (!text.is_empty()).then(|| list(text));
        Sources::parse(option(from).as_deref(), option(not_from).as_deref(), family)
    }

    /// The answer for an address, worked out from the entries the way the kernel's trie does.
    fn answer(entries: &[SourceEntry], address: &str) -> Option<Admission> {
        let address: IpAddr = address.parse().unwrap();
        let sought: [u8; 20] = bytemuck::cast(SourceKey::new(7, Ipv6::from(address)));
        let covers = |entry: &&SourceEntry| {
            let bytes: [u8; 20] = bytemuck::cast(entry.prefix.key);
            (0..entry.prefix.length).all(|bit| {
                let (byte, mask) = (bit as usize / 8, 0x80 >> (bit % 8));
                bytes[byte] & mask == sought[byte] & mask
            })
        };
        let longest = entries
            .iter()
            .filter(covers)
            .max_by_key(|e| e.prefix.length)?;
        longest.admission
    }

    #[test]
    fn the_longest_prefix_decides_and_from_keeps_everybody_else_out() {
        use Admission::{Allowed, Denied};
        for (from, not_from, family, address, expected) in [
            ("10.0.0.0/8", "", Family::V4, "10.1.2.3", Allowed),
            ("10.0.0.0/8", "", Family::V4, "11.1.2.3", Denied),
            ("", "10.0.0.0/8", Family::V4, "10.1.2.3", Denied),
            ("", "10.0.0.0/8", Family::V4, "11.1.2.3", Allowed),
            ("10.0.0.0/8", "10.1.0.0/16", Family::V4, "10.1.2.3", Denied),
            ("10.0.0.0/8", "10.1.0.0/16", Family::V4, "10.2.2.3", Allowed),
            ("10.1.2.3", "10.1.0.0/16", Family::V4, "10.1.2.3", Allowed),
            ("10.1.2.3", "10.1.0.0/16", Family::V4, "10.1.2.4", Denied),
            ("10.1.2.3", "10.1.0.0/16", Family::V4, "9.9.9.9", Denied),
            ("0.0.0.0/0", "10.0.0.0/8", Family::V4, "9.9.9.9", Allowed),
            ("2001:db8::/32", "", Family::V6, "2001:db8::1", Allowed),
            ("2001:db8::/32", "", Family::V6, "2001:db9::1", Denied),
            // An IPv4 prefix has nothing to say about IPv6 addresses that begin with its bytes.
            (
                "32.1.0.0/16 2001:db8::/32",
                "",
                Family::V6,
                "2001:db9::1",
                Denied,
            ),
        ] {
            let entries = parse(from, not_from, family).unwrap().entries(7, family);
            assert_eq!(
                answer(&entries, address),
                Some(expected),
                "{from} {not_from} {address}"
            );
        }
    }

    #[test]
    fn lists_that_make_no_sense_are_refused_with_their_reason() {
        for (from, not_from, message) in [
            (
                "10.0.0.0/33",
                "",
                "--from \"10.0.0.0/33\" is not an address or a prefix",
            ),
            (
                "",
                "example.org",
                "--not-from \"example.org\" is not an address or a prefix",
            ),
            (
                "10.0.0.1/8",
                "",
                "--from 10.0.0.1/8 has bits set behind its prefix length",
            ),
            (
                "10.0.0.0/8",
                "10.0.0.0/8",
                "--from and --not-from both name 10.0.0.0/8",
            ),
            (
                "2001:db8::/32",
                "",
                "--from names no IPv4 prefix, and the rule is IPv4",
            ),
            (
                "10.0.0.0/8",
                "::/0",
                "--not-from names no IPv4 prefix, and the rule is IPv4",
            ),
        ] {
            let refusal = parse(from, not_from, Family::V4).unwrap_err();
            assert_eq!(refusal.to_string(), message);
            assert!(!refusal.hint().is_empty());
        }
        let empty = Sources::parse(Some(&[]), None, Family::V4).unwrap_err();
        assert_eq!(empty.to_string(), "--from names no prefix at all");
    }

    #[test]
    fn a_list_is_written_with_commas_and_files() {
        let read = |path: &Path| {
            match path.to_str() {
            Some("/lists/office") => {
                Ok("# the office\n203.0.113.0/24\n\n198.51.100.7 # door\n2001:db8::/32, 10.0.0.0/8\r\n".to_owned())
            }
            _ => Err(io::Error::from(io::ErrorKind::NotFound)),
        }
        };
        let expand = |lists: &[&str]| {
            let lists: Vec<_> = lists.iter().map(|list| (*list).to_owned()).collect();
            expand_with(&lists, read)
        };
        assert_eq!(expand(&[]), Ok(None));
        assert_eq!(
            expand(&["192.0.2.0/24,@/lists/office", "192.0.2.7"]),
            Ok(Some(list(
                "192.0.2.0/24 203.0.113.0/24 198.51.100.7 2001:db8::/32 10.0.0.0/8 192.0.2.7"
            )))
        );
        let refusal = expand(&["@/lists/nowhere"]).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "cannot read /lists/nowhere: entity not found"
        );
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(
            v4 in proptest::collection::btree_map(any::<u32>(), (0..=32_u8, any::<bool>()), 1..20),
            v6 in proptest::collection::btree_map(any::<u128>(), (0..=128_u8, any::<bool>()), 1..20),
        ) {
            let nets = v4
                .into_iter()
                .map(|(bits, (length, is_from))| (IpAddr::V4(bits.into()), length, is_from))
                .chain(v6.into_iter().map(|(bits, (length, is_from))| (IpAddr::V6(bits.into()), length, is_from)));
            let (mut from, mut not_from) = (Vec::new(), Vec::new());
            let mut seen = std::collections::BTreeSet::new();
            for (address, length, is_from) in nets {
                let net = IpNet::new(address, length).unwrap().trunc();
                if seen.insert(net) {
                    if is_from { from.push(net.to_string()) } else { not_from.push(net.to_string()) }
                }
            }
            let option = |list: &Vec<String>| (!list.is_empty()).then(|| list.clone());
            for family in [Family::V4, Family::V6] {
                let Ok(sources) = Sources::parse(option(&from).as_deref(), option(&not_from).as_deref(), family) else {
                    continue;
                };
                let again = Sources::parse(sources.from().as_deref(), sources.not_from().as_deref(), family);
                prop_assert_eq!(again.unwrap(), sources);
            }
        }
    }
}
