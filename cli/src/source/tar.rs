//! Pictures in an archive, as WebDataset has them: they are read where they lie.

use std::{fs::File, io::BufReader, path::Path, sync::Arc};

use super::{Item, List, Listed, NO_TEXT, Place, Unlisted, is_picture};

/// The members that are pictures, by the names of archive and member.
pub(super) fn members(path: &Path) -> List<'static> {
    let mut found = Vec::new();
    if let Err(error) = read(path, &mut found) {
        found.push(Err(Unlisted::new(&path.display(), &format!("cannot read it: {error}"))));
    }
    Box::new(found.into_iter())
}

/// As in folders; names of members often begin with `./`.
fn is_hidden(member: &[u8]) -> bool {
    let mut parts = member.split(|byte| *byte == b'/');
    parts.any(|part| part.starts_with(b".") && part != b"." && part != b"..")
}

fn read(path: &Path, found: &mut Vec<Listed>) -> std::io::Result<()> {
    let archive: Arc<Path> = path.into();
    for entry in tar::Archive::new(BufReader::new(File::open(path)?)).entries_with_seek()? {
        let entry = entry?;
        let member = entry.path_bytes();
        let name = format!("{}/{}", path.display(), String::from_utf8_lossy(&member));
        let kind = entry.header().entry_type();
        if is_hidden(&member) || !is_picture(&name) {
            continue;
        }
        if kind.is_hard_link() || kind.is_symlink() {
            found.push(Err(Unlisted::new(&name, &"links in archives are not followed")));
        } else if kind.is_file() {
            let (offset, size) = (entry.raw_file_position(), entry.size());
            let place = Place::Member { archive: Arc::clone(&archive), offset, size };
            let is_text = std::str::from_utf8(&member).is_ok();
            let item = || Item { name: name.clone(), place };
            found.push(is_text.then(item).ok_or_else(|| Unlisted::new(&name, &NO_TEXT)));
        }
    }
    Ok(())
}
