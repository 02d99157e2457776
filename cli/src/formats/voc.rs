//! Pascal VOC: an XML file for each picture, boxes in whole pixels from 1.

use std::path::Path;

use quick_xml::Writer;

use super::{
    out::Out,
    pictures::{Object, Picture, Pictures},
    xml::{self, Xml},
};

pub(super) fn write(pictures: &Pictures, to: &Out<'_>, folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let names = to.names(Picture::below)?;
    pictures.each(|picture| {
        let path = folder.join(names.file(picture, "xml"));
        to.file(&path, |out| {
            let mut writer = Writer::new_with_indent(out, b' ', 2);
            xml::parent(&mut writer, "annotation", &[], |writer| annotation(writer, picture))
        })
    })
}

fn annotation(writer: &mut Xml<'_>, picture: &Picture) -> anyhow::Result<()> {
    let path = Path::new(&picture.name);
    let part =
        |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    xml::text(writer, "folder", &part(path.parent().map(Path::as_os_str)))?;
    xml::text(writer, "filename", &part(path.file_name()))?;
    xml::parent(writer, "source", &[], |writer| xml::text(writer, "database", "Florence-2"))?;
    xml::parent(writer, "size", &[], |writer| {
        xml::text(writer, "width", &picture.width.to_string())?;
        xml::text(writer, "height", &picture.height.to_string())?;
        xml::text(writer, "depth", "3")
    })?;
    xml::text(writer, "segmented", "0")?;
    for found in &picture.objects {
        xml::parent(writer, "object", &[], |writer| object(writer, picture, found))?;
    }
    Ok(())
}

fn object(writer: &mut Xml<'_>, picture: &Picture, object: &Object) -> anyhow::Result<()> {
    xml::text(writer, "name", &object.label)?;
    xml::text(writer, "pose", "Unspecified")?;
    xml::text(writer, "truncated", "0")?;
    xml::text(writer, "difficult", "0")?;
    let [x1, y1, x2, y2] = object.bounds.map(f64::round);
    // The first and the last pixel: those from `x1` to `x2 - 1`, counted from 1.
    let (width, height) = (picture.width as f64, picture.height as f64);
    let (x1, y1) = ((x1 + 1.0).min(width), (y1 + 1.0).min(height));
    xml::parent(writer, "bndbox", &[], |writer| {
        xml::text(writer, "xmin", &x1.to_string())?;
        xml::text(writer, "ymin", &y1.to_string())?;
        xml::text(writer, "xmax", &x2.max(x1).to_string())?;
        xml::text(writer, "ymax", &y2.max(y1).to_string())
    })
}
