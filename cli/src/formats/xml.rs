//! Elements of XML, escaped.

use std::{fs::File, io::BufWriter};

use quick_xml::{
    Writer,
    events::{BytesEnd, BytesStart, BytesText, Event},
};

/// What elements are written to.
pub(super) type Xml<'a> = Writer<&'a mut BufWriter<File>>;

/// An element with others in it.
pub(super) fn parent<'a>(
    writer: &mut Xml<'a>,
    name: &str,
    attributes: &[(&str, &str)],
    children: impl FnOnce(&mut Xml<'a>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let start = BytesStart::new(name).with_attributes(attributes.iter().copied());
    writer.write_event(Event::Start(start))?;
    children(writer)?;
    Ok(writer.write_event(Event::End(BytesEnd::new(name)))?)
}

/// An element of a text.
pub(super) fn text(writer: &mut Xml<'_>, name: &str, text: &str) -> anyhow::Result<()> {
    parent(writer, name, &[], |writer| Ok(writer.write_event(Event::Text(BytesText::new(text)))?))
}
