//! The memory of a bucket as SVG: every buffer of the arena from its first write to its last read, at its offset.

use crate::cli::draw::family::Family;
use crate::cli::draw::text::{Anchor, CLUSTER, CODE, DETAIL, HEADING, ROW, SUBHEADING, Svg, px};
use crate::cli::draw::view::{layer, part};
use crate::cli::table::size;
use crate::ir::Stage;
use crate::plan::{ALIGNMENT, Bucket, Instr, Op, Program, Ref, Region, Semantic};

/// The plot of live bytes: upper end, height.
const LIVE: (f64, f64) = (70.0, 84.0);
/// Upper end of the arena's axes.
const TOP: f64 = LIVE.0 + LIVE.1 + 16.0;
/// Height of the arena's axes.
const HEIGHT: f64 = 400.0;
/// Right margin.
const MARGIN: f64 = 20.0;
/// The pool: left end, width.
const POOL: (f64, f64) = (MARGIN, 118.0);
/// From the pool to the axes: room for ticks.
const TICKS: f64 = 86.0;
/// Width of the axes that is aimed at, and limits on the width of a step.
const WIDTH: f64 = 752.0;
const STEP: (f64, f64) = (2.0, 30.0);
/// Least width of a step that has its name under it.
const NAMED: f64 = 9.5;

/// A bucket's arena over its steps, and the regions of the pool. A position past the last bucket gives an empty drawing.
pub fn memory_svg(program: &Program, bucket: usize) -> String {
    match program.buckets.get(bucket) {
        Some(bucket) => Memory::new(program, bucket).draw(),
        None => Svg::default().finish(1.0, 1.0),
    }
}

/// What a buffer holds, by what writes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    /// The residual stream.
    Residual,
    /// The result of an operator of a family.
    Of(Family),
}

impl Role {
    /// By the step that writes it.
    fn of(semantic: &Semantic) -> Role {
        let residual = Stage::Residual.to_string();
        let embeds = semantic.body.iter().any(|Instr(op, ..)| *op == Op::Embed);
        if embeds || semantic.name.split('+').any(|stage| stage == residual) {
            return Role::Residual;
        }
        let families = semantic.body.iter().map(|Instr(op, ..)| Family::of_instruction(op));
        Role::Of(families.min().unwrap_or(Family::Pointwise))
    }

    fn name(self) -> &'static str {
        match self {
            Role::Residual => "residual stream",
            Role::Of(family) => family.name(),
        }
    }

    fn colours(self) -> (&'static str, &'static str) {
        match self {
            Role::Residual => ("#c9d3df", "#5b6b80"),
            Role::Of(family) => (family.fill(), family.stroke()),
        }
    }
}

/// A buffer and when it is alive.
struct Life<'p> {
    name: &'p str,
    offset: u64,
    bytes: u64,
    first: usize,
    last: usize,
    role: Role,
}

struct Memory<'p> {
    program: &'p Program,
    bucket: &'p Bucket,
    lives: Vec<Life<'p>>,
    /// Bytes of one pixel of height.
    scale: f64,
    /// Width of a step.
    step: f64,
}

impl<'p> Memory<'p> {
    fn new(program: &'p Program, bucket: &'p Bucket) -> Self {
        let lives = lives(program, bucket);
        let ends = lives.iter().map(|life| life.offset.saturating_add(life.bytes)).max().unwrap_or(0);
        let top = ends.max(bucket.arena_bytes).max(bucket.arena_lower_bound).max(1);
        let step = (WIDTH / bucket.steps.len().max(1) as f64).clamp(STEP.0, STEP.1);
        Memory { program, bucket, lives, scale: top as f64 * 1.04 / HEIGHT, step }
    }

    fn left(&self) -> f64 {
        POOL.0 + POOL.1 + TICKS
    }

    fn right(&self) -> f64 {
        self.left() + self.step * self.bucket.steps.len() as f64
    }

    fn x(&self, step: usize) -> f64 {
        self.left() + self.step * step as f64
    }

    fn y(&self, bytes: u64) -> f64 {
        TOP + HEIGHT - bytes as f64 / self.scale
    }

    fn draw(&self) -> String {
        let bucket = self.bucket;
        let mut svg = Svg::default();
        svg.raw(
            "<style>.grid{stroke:#e6eaef;stroke-width:1}.axis{stroke:#9aa5b1;stroke-width:1;fill:none}\
             .live{fill:none;stroke:#c0392b;stroke-width:1.3}.area{fill:#c0392b;fill-opacity:.1}\
             .bound{fill:none;stroke:#c0392b;stroke-width:1;stroke-dasharray:6 4;opacity:.75}</style>\n",
        );
        let heading = format!("arena of {}", bucket.name);
        let excess = match bucket.arena_lower_bound {
            0 => 0.0,
            bound => 100.0 * (bucket.arena_bytes as f64 / bound as f64 - 1.0),
        };
        let subheading = format!(
            "{} buffers in {}, lower bound {} (+{excess:.1} %) · {} steps · T={}, S={}, R={}",
            bucket.buffers.len(),
            size(bucket.arena_bytes),
            size(bucket.arena_lower_bound),
            bucket.steps.len(),
            bucket.tokens,
            bucket.sequences,
            bucket.rows,
        );
        svg.text(HEADING, Anchor::Start, MARGIN, 24.0, &heading);
        svg.text(SUBHEADING, Anchor::Start, MARGIN, 45.0, &subheading);
        self.draw_pool(&mut svg);
        let below = self.draw_axes(&mut svg);
        self.draw_buffers(&mut svg);
        self.draw_live(&mut svg);
        let bottom = self.draw_legend(&mut svg, below + 22.0);
        let text = SUBHEADING.width(&subheading).max(HEADING.width(&heading)) + MARGIN;
        svg.finish((self.right() + MARGIN).max(text + MARGIN).max(self.legend_width()), bottom + 16.0)
    }

    /// The regions of the pool from low to high offsets, upwards; heights are not to scale.
    fn draw_pool(&self, svg: &mut Svg) {
        let pool = &self.program.pool;
        let regions: [(&str, &Region, [&str; 2]); 4] = [
            ("weights", &pool.weights, ["#e2eefc", "#3f78c3"]),
            ("state", &pool.state, ["#ece7fb", "#7d5fc7"]),
            ("arena", &pool.arena, ["#fdf5d4", "#b8952a"]),
            ("io", &pool.io, ["#e4f5e8", "#3f9a5f"]),
        ];
        let share = |region: &Region| (region.bytes.max(1) as f64).log2();
        let total: f64 = regions.iter().map(|(_, region, _)| share(region)).sum::<f64>().max(1.0);
        let least = 44.0;
        let spare = HEIGHT - least * regions.len() as f64;
        let mut bottom = TOP + HEIGHT;
        for (name, region, [fill, stroke]) in regions {
            let height = least + spare * share(region) / total;
            let top = bottom - height;
            svg.open("region", &format!("{name}: {} bytes at offset {} of the pool", region.bytes, region.offset));
            let look = format!("fill=\"{fill}\" stroke=\"{stroke}\"");
            svg.rect((POOL.0, top + 1.5), (POOL.1, height - 3.0), 5.0, &look);
            let (middle, centre) = (POOL.0 + POOL.1 / 2.0, top + height / 2.0);
            svg.text(ROW, Anchor::Middle, middle, centre - 7.0, name);
            svg.text(CODE, Anchor::Middle, middle, centre + 7.0, &size(region.bytes));
            svg.close();
            if name == "arena" {
                let (a, b) = (px(POOL.0 + POOL.1), px(self.left()));
                let (low, high) = (px(TOP + HEIGHT), px(self.y(region.bytes).max(TOP)));
                let commands = format!("M{a} {}L{b} {high}V{low}L{a} {}Z", px(top + 5.0), px(top + height - 5.0));
                svg.path(&commands, "fill=\"#fdf5d4\" fill-opacity=\".55\"");
            }
            bottom = top;
        }
        let total = format!("pool {}", size(pool.bytes()));
        svg.text(ROW, Anchor::Middle, POOL.0 + POOL.1 / 2.0, TOP + HEIGHT + 14.0, &total);
        svg.text(DETAIL, Anchor::Middle, POOL.0 + POOL.1 / 2.0, TOP + HEIGHT + 28.0, "(not to scale)");
    }

    /// Bands of layers, ticks of bytes, names of steps. Returns where the drawing may go on below.
    fn draw_axes(&self, svg: &mut Svg) -> f64 {
        let (left, right, bottom) = (self.left(), self.right(), TOP + HEIGHT);
        let steps = &self.bucket.steps;
        let named = self.step >= NAMED;
        let mut below = bottom + 4.0;
        if named {
            let mut longest = 0.0f64;
            for (i, step) in steps.iter().enumerate() {
                let name = abbreviated(&step.name);
                longest = longest.max(DETAIL.width(&name));
                let (x, y) = (self.x(i) + self.step / 2.0, bottom + 8.0);
                let (cx, cy) = (px(x), px(y));
                svg.raw(&format!("<g transform=\"translate({cx} {cy}) rotate(-90)\">"));
                svg.text(DETAIL, Anchor::End, 0.0, 0.0, &name);
                svg.raw("</g>");
            }
            below += longest + 8.0;
        }
        let group = |at: usize| match layer(&steps[at].name) {
            Some(layer) => layer.to_string(),
            None => part(&steps[at].name).split('.').next().unwrap_or("").to_owned(),
        };
        let (mut first, mut odd) = (0, false);
        while first < steps.len() {
            let name = group(first);
            let last = (first..steps.len()).take_while(|&at| group(at) == name).last().unwrap_or(first);
            let (a, b) = (self.x(first), self.x(last + 1));
            if odd {
                svg.rect((a, TOP), (b - a, HEIGHT), 0.0, "fill=\"#f4f6f9\"");
            }
            svg.path(&format!("M{} {}V{}", px(a), px(below), px(below + 5.0)), "class=\"axis\"");
            svg.path(&format!("M{} {}V{}", px(b), px(below), px(below + 5.0)), "class=\"axis\"");
            let long = if layer(&steps[first].name).is_some() { format!("layer {name}") } else { name.clone() };
            let fits = |text: &str| CLUSTER.width(text) + 4.0 <= b - a;
            if let Some(label) = [&long, &name].into_iter().find(|text| fits(text)) {
                svg.text(CLUSTER, Anchor::Middle, (a + b) / 2.0, below + 9.0, label);
            }
            (first, odd) = (last + 1, !odd);
        }
        let (unit, suffix) = unit(self.scale * HEIGHT);
        let tick = nice(self.scale * HEIGHT / unit / 7.0) * unit;
        let mut bytes = 0.0;
        while bytes <= self.scale * HEIGHT {
            let y = self.y(bytes as u64);
            svg.path(&format!("M{} {}H{}", px(left), px(y), px(right)), "class=\"grid\"");
            let label = if bytes > 0.0 { format!("{} {suffix}", px(bytes / unit)) } else { "0".to_owned() };
            svg.text(CODE, Anchor::End, left - 7.0, y, &label);
            bytes += tick;
        }
        svg.path(&format!("M{} {}V{}H{}", px(left), px(TOP), px(bottom), px(right)), "class=\"axis\"");
        below + 18.0
    }

    fn draw_buffers(&self, svg: &mut Svg) {
        for life in &self.lives {
            let (a, b) = (self.x(life.first), self.x((life.last + 1).min(self.bucket.steps.len())));
            let (bottom, top) = (self.y(life.offset), self.y(life.offset.saturating_add(life.bytes)));
            let height = (bottom - top).max(0.8);
            let (fill, stroke) = life.role.colours();
            let steps = &self.bucket.steps;
            let step = |at: usize| steps.get(at).map_or("", |step| step.name.as_str());
            let tooltip = format!(
                "%{}, {}\n{} ({} bytes) at offset {}\nsteps {} to {}: {} to {}",
                life.name,
                life.role.name(),
                size(life.bytes),
                life.bytes,
                life.offset,
                life.first,
                life.last,
                step(life.first),
                step(life.last),
            );
            svg.open("buffer", &tooltip);
            let inset = (self.step * 0.06).min(1.0);
            let look = format!("fill=\"{fill}\" fill-opacity=\".9\" stroke=\"{stroke}\" stroke-width=\".8\"");
            svg.rect(
                (a + inset, bottom - height),
                ((b - a - 2.0 * inset).max(0.0), height),
                1.5f64.min(height / 3.0),
                &look,
            );
            if height >= 13.0 && DETAIL.width(life.name) + 6.0 <= b - a {
                svg.text(DETAIL, Anchor::Middle, (a + b) / 2.0, bottom - height / 2.0, life.name);
            }
            svg.close();
        }
    }

    /// Live bytes at each step, and the largest of them as a line, here and in the arena.
    fn draw_live(&self, svg: &mut Svg) {
        let mut live = vec![0u64; self.bucket.steps.len()];
        for life in &self.lives {
            let room = life.bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(life.bytes);
            let steps = live.iter_mut().take(life.last + 1).skip(life.first);
            steps.for_each(|bytes| *bytes = bytes.saturating_add(room));
        }
        let bound = self.bucket.arena_lower_bound;
        let most = live.iter().copied().max().unwrap_or(0).max(bound).max(1);
        let bottom = LIVE.0 + LIVE.1;
        let y = |bytes: u64| bottom - bytes as f64 / most as f64 * (LIVE.1 - 6.0);
        let (left, right) = (px(self.left()), px(self.right()));
        let mut commands = String::new();
        for (step, &bytes) in live.iter().enumerate() {
            let start = if step == 0 { 'M' } else { 'L' };
            commands += &format!("{start}{} {}H{}", px(self.x(step)), px(y(bytes)), px(self.x(step + 1)));
        }
        if !commands.is_empty() {
            svg.path(&format!("{commands}V{bottom}H{left}Z"), "class=\"area\"");
            svg.path(&commands, "class=\"live\"");
        }
        svg.path(&format!("M{left} {}V{bottom}H{right}", px(LIVE.0)), "class=\"axis\"");
        svg.text(CODE, Anchor::End, self.left() - 7.0, y(most), &size(most));
        svg.text(CODE, Anchor::End, self.left() - 7.0, bottom - 2.0, "0");
        svg.text(DETAIL, Anchor::End, self.left() - 7.0, (y(most) + bottom) / 2.0, "live bytes");
        for height in [y(bound), self.y(bound)] {
            svg.path(&format!("M{left} {}H{right}", px(height)), "class=\"bound\"");
        }
    }

    fn roles(&self) -> Vec<Role> {
        let all = std::iter::once(Role::Residual).chain(Family::ALL.into_iter().map(Role::Of));
        all.filter(|role| self.lives.iter().any(|life| life.role == *role)).collect()
    }

    fn legend_width(&self) -> f64 {
        let lines = ["live bytes", "lower bound"].iter().map(|name| DETAIL.width(name) + 46.0).sum::<f64>();
        let roles = self.roles().into_iter().map(|role| DETAIL.width(role.name()) + 38.0).sum::<f64>();
        self.left() + lines + roles + MARGIN
    }

    fn draw_legend(&self, svg: &mut Svg, y: f64) -> f64 {
        let mut x = self.left();
        svg.open("legend", "");
        for (name, class) in [("live bytes", "live"), ("lower bound", "bound")] {
            svg.path(&format!("M{} {}H{}", px(x), px(y + 5.5), px(x + 24.0)), &format!("class=\"{class}\""));
            svg.text(DETAIL, Anchor::Start, x + 30.0, y + 5.5, name);
            x += DETAIL.width(name) + 46.0;
        }
        for role in self.roles() {
            let (fill, stroke) = role.colours();
            svg.rect((x, y), (16.0, 11.0), 2.0, &format!("fill=\"{fill}\" stroke=\"{stroke}\""));
            svg.text(DETAIL, Anchor::Start, x + 22.0, y + 5.5, role.name());
            x += DETAIL.width(role.name()) + 38.0;
        }
        svg.close();
        y + 11.0
    }
}

/// When each buffer is alive: from the first step that touches it to the last; to the end if it is returned, or made before
/// the head and read by it, because the head may run again.
fn lives<'p>(program: &'p Program, bucket: &'p Bucket) -> Vec<Life<'p>> {
    let end = bucket.steps.len().saturating_sub(1);
    let mut touched: Vec<Option<(usize, usize)>> = vec![None; bucket.buffers.len()];
    let mut role = vec![Role::Of(Family::Pointwise); bucket.buffers.len()];
    for (at, step) in bucket.steps.iter().enumerate() {
        for place in step.reads.iter().chain(&step.writes) {
            if let Ref::Arena(id) = place
                && let Some(touched) = touched.get_mut(*id as usize)
            {
                *touched = Some(touched.map_or((at, at), |(first, _)| (first, at)));
            }
        }
        for place in &step.writes {
            if let Ref::Arena(id) = place
                && let Some(role) = role.get_mut(*id as usize)
            {
                *role = program.semantics.get(step.op as usize).map_or(*role, Role::of);
            }
        }
    }
    let returned = |id: usize| bucket.outputs.iter().any(|(_, place)| *place == Ref::Arena(id as u32));
    let head = bucket.head as usize;
    let mut lives = vec![];
    for (id, buffer) in bucket.buffers.iter().enumerate() {
        let (first, last) = touched[id].unwrap_or((0, 0));
        let last = if returned(id) || (first < head && last >= head) { end } else { last };
        lives.push(Life { name: &buffer.0, offset: buffer.1, bytes: buffer.2, first, last, role: role[id] });
    }
    lives
}

/// A step's name without its layer, cut to a length.
fn abbreviated(name: &str) -> String {
    let short = part(name);
    let short = if short.is_empty() { name } else { short };
    if short.chars().count() <= 30 { short.to_owned() } else { short.chars().take(29).chain(['…']).collect() }
}

/// The unit in which so many bytes are a number of few digits.
fn unit(bytes: f64) -> (f64, &'static str) {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let step = (0..UNITS.len()).rev().find(|&step| bytes >= 2.0 * 1024f64.powi(step as i32)).unwrap_or(0);
    (1024f64.powi(step as i32), UNITS[step])
}

/// The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `x`; at least 1/10.
fn nice(x: f64) -> f64 {
    let power = 10f64.powf(x.max(0.1).log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|n| n * power).find(|&n| n >= x * 0.999).unwrap_or(10.0 * power)
}
