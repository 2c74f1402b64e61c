//! Which functions of the kernel object are verified by themselves.
//!
//! The verifier follows a call into a *static* function, and does so anew for every way that leads to the call. A *global* one it
//! verifies once, for any arguments that its type allows. What a function is for it says the object's type information (BTF), and
//! there the linker makes everything static but the programs. The steps of the slow path are made for being global: their only
//! argument is the context of the hook, which the verifier knows by its type, and their result is an integer.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};

/// How the names of those functions end, before their type parameters as the linker writes them (`<`).
const STEP: &str = "_step_3C_";

const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;
/// Three words: the name's offset, kind and length, a size or another type.
const TYPE: usize = 12;
/// `BTF_FUNC_GLOBAL`, in the place of a type's length.
const GLOBAL: u32 = 1;

/// Kinds of types (`include/uapi/linux/btf.h`), and what follows a type: bytes once, and for each of its elements.
const FUNC: u32 = 12;
const fn trailer(kind: u32, elements: usize) -> Option<usize> {
    Some(match kind {
        // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG
        2 | 7..=12 | 16 | 18 => 0,
        // INT, VAR, DECL_TAG
        1 | 14 | 17 => 4,
        // ARRAY
        3 => 12,
        // STRUCT, UNION, DATASEC, ENUM64
        4 | 5 | 15 | 19 => 12 * elements,
        // ENUM, FUNC_PROTO
        6 | 13 => 8 * elements,
        _ => return None,
    })
}

/// Makes the steps in the object at `path` global.
///
/// # Errors
/// When the object has no type information, or one of a kind that is not known here.
pub fn make_steps_global(path: &Path) -> Result<()> {
    let mut bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let (start, size) = object::File::parse(&*bytes)
        .with_context(|| format!("{} is not an ELF object", path.display()))?
        .section_by_name(".BTF")
        .and_then(|section| section.file_range())
        .with_context(|| format!("{} has no type information", path.display()))?;
    let (start, end) = (start as usize, (start + size) as usize);
    let section = bytes
        .get_mut(start..end)
        .with_context(|| format!("{} is cut short", path.display()))?;
    let changes =
        make_global(section).with_context(|| format!("type information of {}", path.display()))?;
    if changes == 0 {
        return Ok(());
    }
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn word(btf: &[u8], at: usize) -> Result<u32> {
    let bytes = btf.get(at..at + 4).context("it is cut short")?;
    Ok(u32::from_le_bytes(bytes.try_into()?))
}

/// Returns how many functions it has changed.
fn make_global(btf: &mut [u8]) -> Result<usize> {
    if word(btf, 0)? as u16 != MAGIC {
        bail!("it begins with other bytes than it should");
    }
    let header = word(btf, 4)? as usize;
    if header < HEADER {
        bail!("its header is too short");
    }
    let types = header + word(btf, 8)? as usize;
    let types_end = types + word(btf, 12)? as usize;
    let names = header + word(btf, 16)? as usize;
    if types_end > btf.len() {
        bail!("it is cut short");
    }
    let (mut at, mut changes) = (types, 0);
    while at < types_end {
        let (name, info) = (word(btf, at)?, word(btf, at + 4)?);
        let (kind, elements) = (info >> 24 & 0x1f, info as u16);
        if kind == FUNC && is_step(btf, names + name as usize) {
            let global = info & !0xffff | GLOBAL;
            btf[at + 4..at + 8].copy_from_slice(&global.to_le_bytes());
            changes += usize::from(global != info);
        }
        at += TYPE
            + trailer(kind, usize::from(elements))
                .with_context(|| format!("it has a type of unknown kind {kind}"))?;
    }
    Ok(changes)
}

fn is_step(btf: &[u8], name: usize) -> bool {
    let name = btf.get(name..).unwrap_or_default();
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(0);
    name[..end]
        .windows(STEP.len())
        .any(|window| window == STEP.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::{GLOBAL, make_global};

    const INT: u32 = 1 << 24;
    const PROTO_OF_ONE: u32 = 13 << 24 | 1;
    const FUNC: u32 = 12 << 24;

    /// An integer, a prototype, and two functions of these names.
    fn object(names: [&str; 2]) -> Vec<u8> {
        let mut strings = vec![0];
        let offsets = names.map(|name| {
            let at = strings.len() as u32;
            strings.extend(name.bytes().chain([0]));
            at
        });
        let types = [
            vec![0, INT, 4, 32],
            vec![0, PROTO_OF_ONE, 1, 0, 1],
            vec![offsets[0], FUNC, 2],
            vec![offsets[1], FUNC, 2],
        ]
        .concat();
        let types_len = types.len() as u32 * 4;
        let header = [
            0x0001_eb9f,
            24,
            0,
            types_len,
            types_len,
            strings.len() as u32,
        ];
        let words = header.iter().chain(&types);
        let mut bytes: Vec<_> = words.flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn steps_become_global_and_nothing_else_changes() {
        let mut btf = object(["open_step_3C_Ipv4_3E_", "openstep"]);
        let before = btf.clone();
        assert_eq!(make_global(&mut btf).ok(), Some(1));
        let changed: Vec<_> = (0..btf.len())
            .filter(|at| btf[*at] != before[*at])
            .collect();
        // Behind header, integer and prototype: the second word of the first function.
        assert_eq!(changed, [24 + 16 + 20 + 4]);
        assert_eq!(u32::from(btf[changed[0]]), GLOBAL);
        assert_eq!(make_global(&mut btf).ok(), Some(0));
    }

    #[test]
    fn type_information_that_is_cut_short_or_of_an_unknown_kind_is_refused() {
        let whole = object(["a_step_3C_", "b"]);
        for len in 0..24 + 4 * 15 {
            assert!(
                make_global(&mut whole[..len].to_vec()).is_err(),
                "{len} bytes"
            );
        }
        let mut unknown = whole;
        unknown[24 + 7] = 31;
        assert!(make_global(&mut unknown).is_err());
    }
}
