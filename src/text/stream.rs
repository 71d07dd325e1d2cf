//! New tokens to text, as early as it is certain.
//!
//! A token may end in the middle of a character, so what is given out ends at whole characters; what may still become a
//! stop string is held back. Neither depends on how the text is divided into tokens. Where a tokenizer falls back on tokens of a
//! byte each, one byte that is no character makes the text of its whole run U+FFFD; so a run is held back to its end.

use anyhow::Result;

use super::Text;

/// Stands for bytes that are no character, or none yet.
const UNKNOWN: char = '\u{FFFD}';

/// Bytes that an unfinished character can have. A decoder shows them as one [`UNKNOWN`], or as one each.
const UNFINISHED: usize = 3;

/// Tokens after which text that stays invalid is given out as it is.
const PATIENCE: usize = 256;

/// What a token added to the text.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Text that is certain now; often empty.
    pub text: String,
    /// True once a stop string is complete. Neither that nor anything behind it is given out.
    pub stopped: bool,
}

/// New tokens in, whole characters out; holds back what may be the beginning of a stop string or an unfinished character.
pub struct TextStream<'t> {
    rules: &'t Text,
    stops: Vec<String>,
    /// Tokens whose text is known: decoders may write a token in another way if nothing is before it.
    context: Vec<u32>,
    /// Text of the context.
    context_text: String,
    /// Tokens behind the context, whose text may still change.
    pending: Vec<u32>,
    /// Bytes of the pending tokens' text that are certain, and no longer here.
    taken: usize,
    /// Whole characters that may be the beginning of a stop string.
    held: String,
    /// What has been given out.
    given: String,
    stopped: bool,
}

impl<'t> TextStream<'t> {
    pub(super) fn new(rules: &'t Text, stops: &[String]) -> Self {
        TextStream {
            rules,
            stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(),
            context: vec![],
            context_text: String::new(),
            pending: vec![],
            taken: 0,
            held: String::new(),
            given: String::new(),
            stopped: false,
        }
    }

    /// Takes a token. After a stop string there is no more text.
    ///
    /// # Errors
    /// The tokenizer's decoder failed.
    pub fn push(&mut self, token: u32) -> Result<Piece> {
        if self.stopped || self.rules.is_special(token) {
            return Ok(Piece { text: String::new(), stopped: self.stopped });
        }
        self.pending.push(token);
        if self.rules.is_byte(token) && self.pending.len() < PATIENCE && !self.completes_a_stop()? {
            return Ok(Piece::default());
        }
        let fresh = self.fresh(false)?;
        Ok(self.give(&fresh, false))
    }

    /// Gives out what was held back: there are no more tokens.
    ///
    /// # Errors
    /// The tokenizer's decoder failed.
    pub fn finish(&mut self) -> Result<String> {
        if self.stopped {
            return Ok(String::new());
        }
        let fresh = self.fresh(true)?;
        Ok(self.give(&fresh, true).text)
    }

    /// Everything given out so far.
    pub fn text(&self) -> &str {
        &self.given
    }

    /// Whether a stop string would be complete if there were no more tokens; then there are none, and the text is certain.
    fn completes_a_stop(&self) -> Result<bool> {
        if self.stops.is_empty() {
            return Ok(false);
        }
        let Some((text, end)) = self.seen(false)? else { return Ok(false) };
        let all = self.held.clone() + text.get(self.taken..end).unwrap_or_default();
        Ok(self.stops.iter().any(|stop| all.contains(stop.as_str())))
    }

    /// Text of the pending tokens, and how much of it does not change if characters are finished; with `give_up`, all. None
    /// where nothing can be said yet.
    fn seen(&self, give_up: bool) -> Result<Option<(String, usize)>> {
        let together = self.rules.decode(&[&self.context[..], &self.pending].concat())?;
        let text = match together.strip_prefix(&self.context_text) {
            Some(text) => text.to_owned(),
            // A decoder that shows bytes one by one takes back a character when the next is unfinished.
            None if !give_up && self.pending.len() <= UNFINISHED => return Ok(None),
            None => self.rules.decode(&self.pending)?,
        };
        let unfinished = text.chars().rev().take(UNFINISHED).take_while(|&c| c == UNKNOWN).count();
        let end = if give_up { text.len() } else { text.len() - unfinished * UNKNOWN.len_utf8() };
        Ok(Some((text, end)))
    }

    /// Text of the pending tokens that is certain and was not before; with `all`, also what is not.
    fn fresh(&mut self, all: bool) -> Result<String> {
        if self.pending.is_empty() {
            return Ok(String::new());
        }
        let give_up = all || self.pending.len() >= PATIENCE;
        let Some((text, end)) = self.seen(give_up)? else { return Ok(String::new()) };
        // What is certain stays so; a decoder for which that does not hold loses text here rather than repeat it.
        let fresh = text.get(self.taken..end).unwrap_or_default().to_owned();
        self.taken = self.taken.max(end);
        if end == text.len() {
            self.context = std::mem::take(&mut self.pending);
            self.context_text = self.rules.decode(&self.context)?;
            self.taken = 0;
        }
        Ok(fresh)
    }

    /// Adds text to what is held, and gives out what cannot be the beginning of a stop string; with `all`, everything.
    fn give(&mut self, fresh: &str, all: bool) -> Piece {
        self.held.push_str(fresh);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at)));
        let end = match found.min() {
            Some((_, start)) => {
                self.stopped = true;
                self.held.truncate(start);
                start
            }
            None if all => self.held.len(),
            None => self.held.len() - self.beginning(),
        };
        let text: String = self.held.drain(..end).collect();
        self.given.push_str(&text);
        Piece { text, stopped: self.stopped }
    }

    /// Length of the longest end of what is held that a stop string begins with.
    fn beginning(&self) -> usize {
        let longest = self.stops.iter().map(|stop| stop.len().saturating_sub(1)).max().unwrap_or(0);
        let starts = self.held.char_indices().map(|(at, _)| at).filter(|at| self.held.len() - at <= longest);
        let mut ends = starts.map(|at| &self.held[at..]);
        ends.find(|end| self.stops.iter().any(|stop| stop.starts_with(end))).map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{self, bpe};
    use super::*;
    use proptest::prelude::*;

    fn strings(stops: &[&str]) -> Vec<String> {
        stops.iter().map(ToString::to_string).collect()
    }

    /// The pieces that tokens give, one a token, and what is left at the end.
    fn pieces(text: &Text, tokens: &[u32], stops: &[&str]) -> (Vec<Piece>, String) {
        let mut stream = text.stream(&strings(stops));
        let pieces: Vec<Piece> = tokens.iter().map(|&token| stream.push(token).expect("text")).collect();
        let rest = stream.finish().expect("text");
        let all: String = pieces.iter().map(|piece| piece.text.as_str()).chain([rest.as_str()]).collect();
        assert_eq!(stream.text(), all);
        (pieces, rest)
    }

    fn texts(pieces: &[Piece]) -> Vec<&str> {
        pieces.iter().map(|piece| piece.text.as_str()).collect()
    }

    #[test]
    fn characters_come_whole_and_at_once() {
        let (_folder, text) = fixture::open(&[]);
        let (found, rest) = pieces(&text, &bpe("aé你😀b"), &[]);
        assert_eq!(texts(&found), ["a", "", "é", "", "", "你", "", "", "", "😀", "b"]);
        assert_eq!(rest, "");
    }

    #[test]
    fn a_character_that_is_never_finished_is_shown_at_the_end() {
        let (_folder, text) = fixture::open(&[]);
        let (found, rest) = pieces(&text, &bpe("a😀")[..3], &[]);
        assert_eq!((texts(&found), rest.as_str()), (vec!["a", "", ""], "\u{FFFD}"));
        let broken = [&bpe("😀")[..2], &bpe("b")].concat();
        let (found, rest) = pieces(&text, &broken, &[]);
        assert_eq!((texts(&found), rest.as_str()), (vec!["", "", "\u{FFFD}b"], ""));
    }

    #[test]
    fn special_tokens_are_left_out_even_within_a_character() {
        let (_folder, text) = fixture::open(&[]);
        let bytes = bpe("é");
        let (found, _) = pieces(&text, &[1, bytes[0], 2, bytes[1], 2], &[]);
        assert_eq!(texts(&found), ["", "", "", "é", ""]);
    }

    #[test]
    fn a_stop_string_ends_the_text_and_is_not_given() {
        let (_folder, text) = fixture::open(&[]);
        let (found, rest) = pieces(&text, &bpe("one\n\ntwo"), &["\n\n"]);
        assert_eq!(texts(&found).concat() + &rest, "one");
        assert_eq!(found.iter().position(|piece| piece.stopped), Some(4));
        assert_eq!(found[3].text, "", "a line that may be the stop's first half waits");
        let (found, _) = pieces(&text, &bpe("a\nb"), &["\n\n"]);
        assert_eq!(texts(&found), ["a", "", "\nb"], "and comes when it is not");
        let (_, rest) = pieces(&text, &bpe("ab"), &["bc"]);
        assert_eq!(rest, "b", "or when there is no more");
    }

    #[test]
    fn the_stop_that_is_complete_first_counts() {
        let (_folder, text) = fixture::open(&[]);
        let (found, _) = pieces(&text, &bpe("xabcd"), &["abcd", "bc", "c"]);
        assert_eq!(texts(&found).concat(), "xa");
        let (found, _) = pieces(&text, &bpe("aab"), &["ab", ""]);
        assert_eq!(texts(&found).concat(), "a", "an empty stop stops nothing");
        let (found, _) = pieces(&text, &bpe("你好吗"), &["好"]);
        assert_eq!(texts(&found).concat(), "你");
    }

    #[test]
    fn a_run_of_bytes_comes_at_its_end() {
        let (_folder, text) = fixture::byte_fallback();
        let byte = |byte: u8| 3 + u32::from(byte);
        let word = text.tokenizer.token_to_id("▁hi").expect("it is there");
        let tokens: Vec<u32> = [word].into_iter().chain("你好é".bytes().map(byte)).chain([word]).collect();
        let (found, rest) = pieces(&text, &tokens, &[]);
        assert_eq!(texts(&found), ["hi", "", "", "", "", "", "", "", "", "你好é hi"]);
        assert_eq!(rest, "");
        let (found, rest) = pieces(&text, &[byte(b'a'), byte(b'\n')], &[]);
        assert_eq!((texts(&found).concat(), rest.as_str()), (String::new(), "a\n"));
        let (found, rest) = pieces(&text, &[byte(0xe4), byte(0xbd), word], &[]);
        assert_eq!(texts(&found).concat() + &rest, "\u{FFFD}\u{FFFD} hi");
        // Whatever comes before in the run is no text then.
        let (found, rest) = pieces(&text, &[byte(b'a'), byte(0xe4), word], &[]);
        assert_eq!(texts(&found).concat() + &rest, "\u{FFFD}\u{FFFD} hi");
        // A stop string ends the run, at the token that completes it.
        let tokens: Vec<u32> = "a\n\nb".bytes().map(byte).collect();
        let (found, _) = pieces(&text, &tokens, &["\n\n", "x"]);
        assert_eq!(texts(&found).concat(), "a");
        assert_eq!(found.iter().position(|piece| piece.stopped), Some(2));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Any tokens, valid text or not: the pieces are what decoding at once gives.
        #[test]
        fn pieces_are_the_whole(tokens in prop::collection::vec(0u32..259, 0..40)) {
            let (_folder, text) = fixture::open(&[]);
            let (found, rest) = pieces(&text, &tokens, &[]);
            prop_assert_eq!(texts(&found).concat() + &rest, text.decode(&tokens).expect("text"));
        }

        /// So are they where a token of bytes may make those before it no text.
        #[test]
        fn pieces_are_the_whole_with_bytes(tokens in prop::collection::vec(0u32..264, 0..40)) {
            let (_folder, text) = fixture::byte_fallback();
            let (found, rest) = pieces(&text, &tokens, &[]);
            prop_assert_eq!(texts(&found).concat() + &rest, text.decode(&tokens).expect("text"));
        }

        /// Where the text ends does not depend on its division into tokens, here into characters.
        #[test]
        fn stops_are_found_wherever_they_are(whole in "[abc]{0,12}", stops in prop::collection::vec("[abc]{1,3}", 0..3)) {
            let (_folder, text) = fixture::open(&[]);
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let end = (0..=whole.len()).find_map(|end| {
                let ends = stops.iter().filter(|stop| whole[..end].ends_with(**stop));
                ends.map(|stop| end - stop.len()).min()
            });
            let (found, rest) = pieces(&text, &bpe(&whole), &stops);
            prop_assert_eq!(texts(&found).concat() + &rest, &whole[..end.unwrap_or(whole.len())]);
            prop_assert_eq!(found.iter().any(|piece| piece.stopped), end.is_some());
        }
    }
}
