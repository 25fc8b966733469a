//! Rows of tokens that lie end to end, with nothing between them.

mod lengths;

use std::any::Any;
use std::ops::Range;

use lengths::Lengths;

/// Where rows begin and end in one run of tokens.
///
/// A token's position is its place in its row, and it attends to what its row has up to there:
/// whatever lies next to a row, its hidden states and gradients are those of the row alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    /// Tokens of each row, none of them 0.
    lengths: Lengths,
    /// Positions of each row that come before its tokens here, in a cache.
    seen: usize,
    /// The task of each row; empty if all are of task 0.
    tasks: Vec<usize>,
}

/// One row: which tokens of the run are its queries, and which are their keys.
///
/// The queries are the last of the keys; without a cache they are the same tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Where the row's queries lie.
    pub queries: Range<usize>,
    /// Where the row's keys and values lie.
    pub keys: Range<usize>,
}

impl Segments {
    /// Rows of these lengths, from their first tokens on.
    pub fn new(lengths: impl IntoIterator<Item = usize>) -> Self {
        Self {
            lengths: lengths.into_iter().filter(|length| *length > 0).collect(),
            seen: 0,
            tasks: Vec::new(),
        }
    }

    /// The same tokens when `seen` others of each row came before.
    pub fn after(self, seen: usize) -> Self {
        Self { seen, ..self }
    }

    /// The same rows, each of its task, for adapters that tell tasks apart.
    ///
    /// # Panics
    /// If there are not as many tasks as rows.
    pub fn of_tasks(self, tasks: Vec<usize>) -> Self {
        assert_eq!(tasks.len(), self.rows(), "one task a row");
        let tasks = match tasks.iter().all(|task| *task == 0) {
            true => Vec::new(),
            false => tasks,
        };
        Self { tasks, ..self }
    }

    /// The same rows with `count` positions more at the beginning of each.
    pub(crate) fn longer_by(self, count: usize) -> Self {
        let lengths = self.lengths.iter().map(|length| length + count).collect();
        Self { lengths, ..self }
    }

    /// The task of each row.
    pub fn tasks(&self) -> impl Iterator<Item = usize> {
        let task = |row: usize| self.tasks.get(row).copied().unwrap_or(0);
        (0..self.rows()).map(task)
    }

    /// How many positions of each row come before its tokens here.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// What a backend makes of where the rows' tokens start, with the end behind it: it is made once
    /// for all clones of these rows, if the one there is `is_good`.
    pub fn made_once<T: Any + Clone + Send + Sync>(
        &self,
        is_good: impl Fn(&T) -> bool,
        make: impl FnOnce(&[usize]) -> T,
    ) -> T {
        self.lengths.made_once(is_good, make)
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.lengths.len()
    }

    /// How many tokens there are, without those in a cache.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// The rows, one after the other.
    pub fn iter(&self) -> impl Iterator<Item = Segment> {
        let (mut query, mut key) = (0, 0);
        self.lengths.iter().map(move |length| {
            let queries = query..query + length;
            let keys = key..key + self.seen + length;
            (query, key) = (queries.end, keys.end);
            Segment { queries, keys }
        })
    }
}

impl Segment {
    /// The positions of the queries in the row.
    pub fn positions(&self) -> Range<usize> {
        self.keys.len() - self.queries.len()..self.keys.len()
    }

    /// How many keys the row's `query`-th query sees: all up to its own.
    pub fn seen_by(&self, query: usize) -> usize {
        self.positions().start + query + 1
    }

    /// Cuts the row into `queries` at a time, each with the keys that the last of them sees.
    pub fn pieces(self, queries: usize) -> impl Iterator<Item = Segment> {
        let starts = self.queries.clone().step_by(queries);
        starts.map(move |start| {
            let end = self.queries.end.min(start + queries);
            Segment {
                queries: start..end,
                keys: self.keys.start..self.keys.end - (self.queries.end - end),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(segments: impl Iterator<Item = Segment>) -> Vec<(Range<usize>, Range<usize>)> {
        segments.map(|row| (row.queries, row.keys)).collect()
    }

    #[test]
    fn rows_lie_end_to_end() {
        let segments = Segments::new([3, 0, 1, 2]);
        assert_eq!((segments.rows(), segments.tokens()), (3, 6));
        let all = [(0..3, 0..3), (3..4, 3..4), (4..6, 4..6)];
        assert_eq!(ranges(segments.iter()), all);
        let positions = segments.iter().flat_map(|row| row.positions());
        assert_eq!(positions.collect::<Vec<_>>(), [0, 1, 2, 0, 0, 1]);
    }

    #[test]
    fn cached_positions_are_keys_of_every_row() {
        let segments = Segments::new([2, 2]).after(5);
        assert_eq!(segments.tokens(), 4);
        assert_eq!(ranges(segments.iter()), [(0..2, 0..7), (2..4, 7..14)]);
        let row = segments.iter().last().expect("there are two");
        assert_eq!((row.positions(), row.seen_by(0)), (5..7, 6));
    }

    #[test]
    fn pieces_see_what_their_last_query_sees() {
        let row = Segment {
            queries: 10..15,
            keys: 20..28,
        };
        let pieces = [(10..12, 20..25), (12..14, 20..27), (14..15, 20..28)];
        assert_eq!(ranges(row.pieces(2)), pieces);
    }
}
