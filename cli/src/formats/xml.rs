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
    let mut start = BytesStart::new(name);
    for (name, value) in attributes {
        start.push_attribute((*name, &*allowed(value)));
    }
    writer.write_event(Event::Start(start))?;
    children(writer)?;
    Ok(writer.write_event(Event::End(BytesEnd::new(name)))?)
}

/// An element of a text.
pub(super) fn text(writer: &mut Xml<'_>, name: &str, text: &str) -> anyhow::Result<()> {
    parent(writer, name, &[], |writer| {
        Ok(writer.write_event(Event::Text(BytesText::new(&allowed(text))))?)
    })
}

/// A text with another sign for those that XML has no way to write.
fn allowed(text: &str) -> String {
    let is_none = |sign| matches!(sign, '\0'..='\x08' | '\x0b' | '\x0c' | '\x0e'..='\x1f' | '\u{fffe}' | '\u{ffff}');
    text.replace(is_none, "\u{fffd}")
}
