//! What the embedded kernel object does not need: the debug information that its types (BTF) were made from.
//!
//! It is thirteen of fourteen parts of the object, and every start reads all of it. Source lines in the verifier's messages come
//! from `.BTF.ext`, which stays.

use anyhow::{Context, Result};
use object::{
    build::elf::{Builder, Section, SectionData},
    elf::SHT_STRTAB,
};

const DEBUG: [&[u8]; 2] = [b".debug_", b".rel.debug_"];

/// The object without its debug information.
///
/// # Errors
/// When it is not an ELF object.
pub fn without_debug_information(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(object).context("the kernel object is not ELF")?;
    for section in &mut builder.sections {
        section.delete = DEBUG.iter().any(|name| section.name.starts_with(name));
    }
    builder.delete_orphans();
    // LLVM has one table of strings for symbols and sections; the builder writes two.
    let has_names = |section: &Section<'_>| matches!(section.data, SectionData::SectionString);
    if !builder.sections.iter().any(has_names) {
        let names = builder.sections.add();
        names.name = b".shstrtab"[..].into();
        names.sh_type = SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
    }
    let mut stripped = Vec::new();
    builder
        .write(&mut stripped)
        .context("the kernel object cannot be written without its debug information")?;
    Ok(stripped)
}
