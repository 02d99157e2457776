//! CVAT for images 1.1: one XML file, boxes and polygons in pixels.

use std::path::Path;

use quick_xml::{
    Writer,
    events::{BytesDecl, Event},
};

use super::{
    out::Out,
    pictures::{Object, Picture, Pictures},
    xml::{self, Xml},
};

pub(super) fn write(pictures: &Pictures, to: &Out<'_>, path: &Path) -> anyhow::Result<()> {
    to.file(path, |out| {
        let mut writer = Writer::new_with_indent(out, b' ', 2);
        writer.write_event(Event::Decl(BytesDecl::new("1.0", Some("utf-8"), None)))?;
        xml::parent(&mut writer, "annotations", &[], |writer| {
            xml::text(writer, "version", "1.1")?;
            meta(writer, pictures)?;
            pictures.each(|picture| image(writer, picture))
        })
    })
}

fn meta(writer: &mut Xml<'_>, pictures: &Pictures) -> anyhow::Result<()> {
    xml::parent(writer, "meta", &[], |writer| {
        xml::parent(writer, "task", &[], |writer| {
            xml::text(writer, "size", &pictures.len().to_string())?;
            xml::parent(writer, "labels", &[], |writer| {
                for name in &pictures.classes.names {
                    xml::parent(writer, "label", &[], |writer| xml::text(writer, "name", name))?;
                }
                Ok(())
            })
        })
    })
}

fn image(writer: &mut Xml<'_>, picture: &Picture) -> anyhow::Result<()> {
    let (id, width, height) =
        ((picture.id - 1).to_string(), picture.width.to_string(), picture.height.to_string());
    let attributes =
        [("id", &*id), ("name", &picture.name), ("width", &width), ("height", &height)];
    xml::parent(writer, "image", &attributes, |writer| {
        picture.objects.iter().try_for_each(|found| object(writer, found))
    })
}

fn object(writer: &mut Xml<'_>, object: &Object) -> anyhow::Result<()> {
    let usual = [("label", &*object.label), ("occluded", "0"), ("source", "auto")];
    if object.is_box {
        let [x1, y1, x2, y2] = object.bounds.map(|number| format!("{number:.2}"));
        let corners = [("xtl", &*x1), ("ytl", &y1), ("xbr", &x2), ("ybr", &y2), ("z_order", "0")];
        return xml::parent(writer, "box", &[&usual[..], &corners].concat(), |_| Ok(()));
    }
    for outline in &object.outlines {
        let points: Vec<String> = outline.iter().map(|(x, y)| format!("{x:.2},{y:.2}")).collect();
        let points = points.join(";");
        let attributes = [&usual[..], &[("points", &*points), ("z_order", "0")]].concat();
        xml::parent(writer, "polygon", &attributes, |_| Ok(()))?;
    }
    Ok(())
}
