//! `florence top`: how servers do, in a terminal.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, stdout},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use ratatui::{
    DefaultTerminal,
    buffer::{Buffer, Cell},
    crossterm::event::{self, Event, KeyCode, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Color, Style, Stylize},
    text::{Line, Span},
    widgets::{Paragraph, Row, Sparkline, Table, Widget},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::block_in_place,
};

use crate::servers::{
    self,
    figures::{Histogram, Latencies, PHASES, of_phase},
    watch::{POINT, Point, Told, View, Watch},
};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    servers: servers::Args,
    /// Print it once, as text; without a terminal that is all there is
    #[arg(long)]
    once: bool,
}

/// The width of what is printed once.
const WIDTH: u16 = 100;
/// Lines that a key for a page goes on.
const PAGE: u16 = 10;
/// A column of numbers.
const NUMBER: u16 = 8;

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let watch = Arc::new(Watch::new(args.servers.servers()?));
    servers::runtime()?.block_on(async {
        watch.start();
        if args.once || !stdout().is_terminal() {
            return once(&watch).await;
        }
        // Before the terminal is changed: after a signal, too, it is to be as it was.
        let is_over = at_signals()?;
        let mut terminal = ratatui::try_init().context("this is no terminal")?;
        let shown = block_in_place(|| live(&watch, &mut terminal, &is_over));
        ratatui::restore();
        shown
    })
}

/// Becomes true once a signal asks for the end.
fn at_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let is_over = Arc::<AtomicBool>::default();
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        let (mut signal, is_over) = (signal(kind)?, Arc::clone(&is_over));
        tokio::spawn(async move {
            signal.recv().await;
            is_over.store(true, Relaxed);
        });
    }
    Ok(is_over)
}

/// Until somebody has seen enough.
fn live(watch: &Watch, terminal: &mut DefaultTerminal, is_over: &AtomicBool) -> anyhow::Result<()> {
    // The first line that is shown, and the last one that may be the first.
    let (mut first, mut last_first) = (0_u16, 0);
    while !is_over.load(Relaxed) {
        terminal.draw(|frame| {
            let screen = Screen::new(watch);
            let area = frame.area();
            last_first = screen.height(area.width).saturating_sub(area.height);
            first = first.min(last_first);
            screen.window(first, area, frame.buffer_mut());
        })?;
        if !event::poll(Duration::from_millis(500))? {
            continue;
        }
        let Event::Key(key) = event::read()? else { continue };
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        first = match key.code {
            KeyCode::Char('c') if is_control => return Ok(()),
            KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
            KeyCode::Up => first.saturating_sub(1),
            KeyCode::Down => first.saturating_add(1),
            KeyCode::PageUp => first.saturating_sub(PAGE),
            KeyCode::PageDown => first.saturating_add(PAGE),
            KeyCode::Home => 0,
            KeyCode::End => last_first,
            _ => first,
        };
    }
    Ok(())
}

/// As text, once every server has answered, or has not.
async fn once(watch: &Watch) -> anyhow::Result<()> {
    let is_asked = |index: usize| {
        watch.known(index).is_some_and(|known| known.told.is_some() || known.error.is_some())
    };
    while !(0..watch.servers.len()).all(is_asked) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let screen = Screen::new(watch);
    let away = screen.away.clone();
    let area = Rect::new(0, 0, WIDTH, screen.height(WIDTH));
    let mut buffer = Buffer::empty(area);
    screen.render(area, &mut buffer);
    let lines = buffer.content.chunks(usize::from(WIDTH));
    let lines = lines.map(|line| line.iter().map(Cell::symbol).collect::<String>());
    let lines: Vec<String> = lines.map(|line| line.trim_end().to_owned()).collect();
    println!("{}", lines.join("\n").trim_end());
    ensure!(away.is_empty(), "not every server answers: {}", away.join("; "));
    Ok(())
}

/// Servers that do not answer, with the reasons.
fn away(watch: &Watch) -> Vec<String> {
    let reason = |index: usize| {
        let known = watch.known(index)?;
        let error = known.error.as_deref().unwrap_or("asking");
        known.told.is_none().then(|| format!("{}: {error}", watch.servers[index].name))
    };
    (0..watch.servers.len()).filter_map(reason).collect()
}

/// A text in lines that are no wider than this.
fn wrapped(text: &str, width: u16) -> Vec<String> {
    let letters: Vec<char> = text.chars().collect();
    letters.chunks(usize::from(width).max(1)).map(|line| line.iter().collect()).collect()
}

/// All that is shown.
struct Screen<'a> {
    watch: &'a Watch,
    view: Option<View>,
    /// A line for each server that does not answer.
    away: Vec<String>,
    times: Listing,
    ends: Listing,
}

/// A table with the room that it takes.
#[derive(Default)]
struct Listing {
    table: Table<'static>,
    width: u16,
    height: u16,
}

impl Listing {
    const MOST: usize = 35;

    /// Names of which the longest decides, up to that of the longest task, then columns of numbers.
    fn new(head: Row<'static>, rows: Vec<(String, Row<'static>)>, numbers: u16) -> Self {
        let longest = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or_default();
        let (width, height) = (lines(longest.min(Self::MOST)), lines(rows.len()).saturating_add(1));
        let columns = (0..numbers).map(|_| Constraint::Length(NUMBER));
        let columns = [Constraint::Fill(1)].into_iter().chain(columns);
        let table = Table::new(rows.into_iter().map(|(_, row)| row), columns);
        let table = table.header(head.style(Style::new().bold())).column_spacing(1);
        Self { table, width: width + numbers * (NUMBER + 1), height }
    }
}

fn lines(count: usize) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}

impl<'a> Screen<'a> {
    const GAP: u16 = 2;
    const NUMBERS: u16 = 3;
    const CHART: u16 = 5;

    fn new(watch: &'a Watch) -> Self {
        let view = watch.view(None);
        let times = view.as_ref().map(times).unwrap_or_default();
        let ends = view.as_ref().map(|view| ends_and_hosts(&view.told)).unwrap_or_default();
        Self { watch, view, away: away(watch), times, ends }
    }

    /// The lines about servers that do not answer: the reason is what matters, so all of it is shown.
    fn away(&self, width: u16) -> Vec<Line<'static>> {
        let lines = self.away.iter().flat_map(|line| wrapped(line, width));
        lines.map(|line| line.fg(Color::Red).into()).collect()
    }

    /// Lines for the servers that answer, with their head.
    fn servers(&self) -> u16 {
        match self.watch.servers.len() - self.away.len() {
            0 => 0,
            up => lines(up).saturating_add(1),
        }
    }

    /// Whether both lists have room side by side.
    fn is_wide(&self, width: u16) -> bool {
        self.times.width + Self::GAP + self.ends.width <= width
    }

    /// What it takes to show all.
    fn height(&self, width: u16) -> u16 {
        let (times, ends) = (self.times.height, self.ends.height);
        let lists = if self.is_wide(width) {
            times.max(ends)
        } else {
            times.saturating_add(ends).saturating_add(1)
        };
        let about_servers = self.servers().saturating_add(lines(self.away(width).len()));
        about_servers.saturating_add(1 + Self::NUMBERS + Self::CHART).saturating_add(lists)
    }

    /// Shows it from a line on, as far as there is room, and tells of the rest.
    fn window(self, first: u16, area: Rect, buffer: &mut Buffer) {
        let height = self.height(area.width);
        let mut all = Buffer::empty(Rect::new(0, 0, area.width, height.max(area.height)));
        self.render(all.area, &mut all);
        for (x, y) in area.positions().map(|at| (at.x, at.y)) {
            buffer[(x, y)] = all[(x - area.x, y - area.y + first)].clone();
        }
        let below = height.saturating_sub(first.saturating_add(area.height));
        if let (true, Some(last)) = (first > 0 || below > 0, area.rows().next_back()) {
            let hint = format!("{first} lines above, {below} below: arrows, PgUp, PgDn; q ends");
            let hint = format!("{hint:width$}", width = usize::from(area.width));
            Line::from(hint.reversed()).render(last, buffer);
        }
    }
}

impl Widget for Screen<'_> {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        let is_wide = self.is_wide(area.width);
        let reasons = self.away(area.width);
        let [servers, away, numbers, chart, rest] = Layout::vertical([
            Constraint::Max(self.servers()),
            Constraint::Length(lines(reasons.len()).saturating_add(1)),
            Constraint::Length(Self::NUMBERS),
            Constraint::Length(Self::CHART),
            Constraint::Fill(1),
        ])
        .areas(area);
        about_servers(self.watch).render(servers, buffer);
        Paragraph::new(reasons).render(away, buffer);
        let Some(view) = &self.view else { return };
        Paragraph::new(in_numbers(view)).render(numbers, buffer);
        answered_a_second(&self.watch.history(None), chart, buffer);
        let (times, ends) = if is_wide {
            let columns = [Constraint::Length(self.times.width), Constraint::Fill(1)];
            let [left, right] = Layout::horizontal(columns).spacing(Self::GAP).areas(rest);
            (left, right)
        } else {
            let parts = [Constraint::Length(self.times.height), Constraint::Fill(1)];
            let [above, below] = Layout::vertical(parts).spacing(1).areas(rest);
            (above, below)
        };
        Widget::render(self.times.table, times, buffer);
        Widget::render(self.ends.table, ends, buffer);
    }
}

fn title(text: &str) -> Row<'static> {
    Row::new([text.to_owned()]).style(Style::new().bold())
}

fn about_servers(watch: &Watch) -> Table<'static> {
    let head = ["server", "", "model", "device", "PING", "memory", "up"];
    let rows = watch.servers.iter().enumerate().filter_map(|(index, server)| {
        let known = watch.known(index)?;
        let told = known.told.as_ref()?;
        let info = |name: &str| told.info.get(name).cloned().unwrap_or_default();
        let model = |name: &str| told.model.get(name).cloned().unwrap_or_default();
        let kind: Vec<String> =
            told.software().into_iter().chain(told.role().map(str::to_owned)).collect();
        let seconds = |name: &str| info(name).parse().unwrap_or_default();
        Some(Row::new([
            server.name.clone(),
            kind.join(", "),
            format!("{} ({})", model("name"), model("state")),
            format!("{} {}", model("device"), model("precision")),
            milliseconds(Some(told.ping_ms)),
            mebibytes(seconds("used_memory_rss")),
            duration(seconds("uptime_in_seconds")),
        ]))
    });
    let widths = [
        Constraint::Min(15),
        Constraint::Min(20),
        Constraint::Min(16),
        Constraint::Min(10),
        Constraint::Length(8),
        Constraint::Length(9),
        Constraint::Length(6),
    ];
    Table::new(rows, widths).header(Row::new(head).style(Style::new().bold()))
}

fn in_numbers(view: &View) -> Vec<Line<'static>> {
    let told = &view.told;
    let line = |figures: &[(&'static str, &str)]| {
        let spans = figures.iter().flat_map(|(name, figure)| {
            [Span::from(format!("{name} ")).dim(), format!("{}   ", told.stat(figure)).bold()]
        });
        spans.collect::<Line<'_>>()
    };
    let mut unfinished = line(&[
        ("waiting", "jobs_in_turn"),
        ("delayed", "jobs_delayed"),
        ("at work", "jobs_active"),
        ("answers from cache", "cache_results"),
        ("pictures from cache", "cache_features"),
    ]);
    if told.stat("paused") > 0.0 {
        unfinished.spans.insert(0, "PAUSED   ".bold().fg(Color::Yellow));
    }
    let ended = line(&[
        ("answered", "jobs_done"),
        ("failed", "jobs_failed"),
        ("cancelled", "jobs_cancelled"),
        ("expired", "jobs_expired"),
        ("retried", "attempts_retried"),
        ("faults", "panics"),
    ]);
    vec![ended, unfinished]
}

/// A chart of the last hour, as far as there is room.
fn answered_a_second(points: &[Point], area: Rect, buffer: &mut Buffer) {
    let at = |name: &str| POINT.iter().position(|known| *known == name).unwrap_or_default();
    let (done, p95) = (at("done"), at("p95"));
    let room = usize::from(area.width);
    let shown = &points[points.len().saturating_sub(room)..];
    let last = shown.last().map_or(0.0, |point| point[done]);
    let p95 = shown.last().map(|point| point[p95]).filter(|p95| p95.is_finite());
    let head = format!("{last:.1} pictures a second, p95 {}", milliseconds(p95));
    let [text, bars] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(area);
    Line::from(head.bold()).render(text, buffer);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "heights of bars")]
    let heights = shown.iter().map(|point| (point[done] * 100.0).max(0.0) as u64);
    Sparkline::default().data(heights.collect::<Vec<_>>()).fg(Color::Blue).render(bars, buffer);
}

/// Latencies of the last five minutes by phase and by task; of all time where there are none.
fn times(view: &View) -> Listing {
    const HEAD: &str = "last five minutes";
    let row = |name: &str, all: &Histogram, recent: Option<Histogram>| {
        let recent = recent.filter(|recent| recent.count > 0.0);
        let shown = recent.as_ref().unwrap_or(all);
        let mean = (shown.count > 0.0).then(|| shown.sum_ms / shown.count);
        let cells = [mean].into_iter().chain(shown.quantiles()).map(milliseconds);
        let row = Row::new([name.to_owned(), shown.count.to_string()].into_iter().chain(cells));
        (name.to_owned(), if recent.is_some() { row } else { row.style(Style::new().dim()) })
    };
    let none = Latencies::new();
    let all = view.told.latencies.as_ref().unwrap_or(&none);
    let recent = view.recent.as_ref();
    let phases = PHASES.iter().map(|phase| {
        row(phase, &of_phase(all, phase), recent.map(|recent| of_phase(recent, phase)))
    });
    let totals = all.iter().filter(|((phase, _), _)| phase == "total");
    let tasks = totals.map(|(key, histogram)| {
        row(&key.1, histogram, recent.and_then(|recent| recent.get(key)).cloned())
    });
    let head = Row::new([HEAD, "jobs", "mean", "p50", "p95", "p99"]);
    let between = [(HEAD.to_owned(), Row::default()), (String::new(), title("by task"))];
    Listing::new(head, phases.chain(between).chain(tasks).collect(), 5)
}

/// Errors by code, and hosts that pictures come from.
fn ends_and_hosts(told: &Told) -> Listing {
    const HEAD: &str = "errors by code";
    let mut codes: BTreeMap<String, f64> = BTreeMap::new();
    for ((_, _, code), count) in told.ended() {
        if !code.is_empty() && count > 0.0 {
            *codes.entry(code).or_default() += count;
        }
    }
    let codes = codes.into_iter().map(|(code, count)| {
        let row = Row::new([code.clone(), count.to_string()]);
        (code, row)
    });
    let hosts = told.hosts.iter().flatten().map(|host| {
        let (fetched, failed) = (host.downloads.to_string(), host.failures.to_string());
        (host.name.clone(), Row::new([host.name.clone(), fetched, failed]))
    });
    let head = Row::new(["host", "fetched", "failed"]).style(Style::new().bold());
    let between = [(HEAD.to_owned(), Row::default()), (String::new(), head)];
    Listing::new(title(HEAD), codes.chain(between).chain(hosts).collect(), 2)
}

fn milliseconds(ms: Option<f64>) -> String {
    match ms {
        None => "-".to_owned(),
        Some(ms) if ms < 10.0 => format!("{ms:.1} ms"),
        Some(ms) if ms < 10_000.0 => format!("{ms:.0} ms"),
        Some(ms) => format!("{:.1} s", ms / 1e3),
    }
}

fn mebibytes(bytes: f64) -> String {
    format!("{:.0} MiB", bytes / f64::from(1 << 20))
}

fn duration(seconds: f64) -> String {
    match seconds {
        short if short < 120.0 => format!("{short:.0} s"),
        some if some < 7200.0 => format!("{:.0} min", some / 60.0),
        long if long < 172_800.0 => format!("{:.0} h", long / 3600.0),
        days => format!("{:.0} d", days / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_have_units_of_their_size() {
        assert_eq!(
            [None, Some(0.25), Some(99.6), Some(12_345.0)].map(milliseconds),
            ["-", "0.2 ms", "100 ms", "12.3 s"]
        );
        assert_eq!(
            [5.0, 600.0, 90_000.0, 864_000.0].map(duration),
            ["5 s", "10 min", "25 h", "10 d"]
        );
        assert_eq!(mebibytes(3.0e6), "3 MiB");
    }

    #[test]
    fn a_long_reason_takes_more_lines() {
        assert_eq!(wrapped("abcdefg", 3), ["abc", "def", "g"]);
        assert_eq!(wrapped("abc", 80), ["abc"]);
    }
}
