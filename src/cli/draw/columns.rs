//! Sections of a drawing, and columns: a drawing that is too high continues beside itself.

use crate::cli::draw::layout::Layout;

/// A drawing higher than this is broken into columns.
const COLUMN: f64 = 4200.0;
/// Between columns, and above a column for the edges that come from the one before.
const GUTTER: (f64, f64) = (44.0, 34.0);
/// Width to height of a drawing in columns.
const ASPECT: f64 = 1.4;

/// A frame's names: the layer, and the part of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Section {
    /// The layer.
    pub layer: Option<u64>,
    /// Empty outside of parts.
    pub part: String,
}

/// Where sections are moved.
pub struct Columns {
    /// Of each section, how far from where the layout put it.
    pub shifts: Vec<(f64, f64)>,
    /// Distance of the last column from the first.
    pub width: f64,
    /// Of the highest column.
    pub height: f64,
}

/// Breaks what is too high into columns, before layers.
pub fn columns(sections: &[Section], layout: &Layout, width: f64) -> Columns {
    let count = sections.len();
    let single = Columns { shifts: vec![(0.0, 0.0); count], width: 0.0, height: layout.height };
    if layout.height <= COLUMN {
        return single;
    }
    let groups: Vec<(usize, usize, f64, f64)> = groups(sections)
        .filter_map(|(first, last)| extent(layout, first, last).map(|(top, bottom)| (first, last, top, bottom)))
        .collect();
    let breaks = |most: f64| {
        let (mut breaks, mut start) = (vec![], 0.0);
        for &(first, _, top, bottom) in &groups {
            if sections[first].layer.is_some() && top > start && bottom - start > most {
                breaks.push(first);
                start = top;
            }
        }
        breaks
    };
    let wanted = (ASPECT * layout.height / width).sqrt().round().max(1.0);
    let mut most = layout.height / wanted;
    while breaks(most).len() + 1 > wanted as usize {
        most *= 1.02;
    }
    let breaks = breaks(most);
    let mut columns = Columns { height: 0.0, ..single };
    let (mut dx, mut dy) = (0.0, 0.0);
    for (first, last, top, bottom) in groups {
        if breaks.contains(&first) {
            dx += width + GUTTER.0;
            dy = GUTTER.1 - top;
        }
        columns.height = columns.height.max(bottom + dy + GUTTER.1);
        columns.shifts[first..=last].fill((dx, dy));
    }
    columns.width = dx;
    columns
}

/// First and last section of each layer, and each other section by itself.
pub fn groups(sections: &[Section]) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let layer = sections.get(first)?.layer;
        let same = |section: &&Section| layer.is_some() && section.layer == layer;
        let last = first + sections[first..].iter().take_while(same).count().max(1) - 1;
        let group = (first, last);
        first = last + 1;
        Some(group)
    })
}

/// Top and bottom of the ranks of some sections; nothing if they have none.
pub fn extent(layout: &Layout, first: usize, last: usize) -> Option<(f64, f64)> {
    let mut bands = layout.bands.iter().filter(|band| (first..=last).contains(&band.section));
    let band = bands.next()?;
    Some((band.top, bands.next_back().unwrap_or(band).bottom))
}
