//! A conversation as text, and as the tokens that a model has seen of it.
//!
//! Each turn's prompt is the whole conversation as the template writes it. Its text is not simply tokenised: text that was made
//! of tokens and is tokenised again may give other tokens, and then a model would have to read its own answers anew. So a prompt
//! begins with the tokens of the prompt before and with those of the answer, as far as the text that the template writes
//! begins with their text; only what follows is tokenised. Where the template writes the past differently from how it was, as
//! some do with an answer's thoughts or spaces, fewer tokens are taken over, or none.

use anyhow::Result;

use super::{Message, Text};

/// A conversation with a model.
pub struct Conversation<'t> {
    rules: &'t Text,
    /// Messages as they are, one after the other, instead of a template.
    raw: bool,
    messages: Vec<Message>,
    /// The prompt of the turn before.
    prompt: Prompt,
    /// Tokens of its answer whose text is in the conversation.
    answer: Vec<u32>,
    /// The prompt whose answer is awaited.
    asked: Option<Prompt>,
}

/// Text and its tokens.
#[derive(Clone, Default)]
struct Prompt {
    text: String,
    tokens: Vec<u32>,
}

impl<'t> Conversation<'t> {
    /// A conversation that the model's template writes, with what is said before all.
    pub fn new(rules: &'t Text, system: Option<&str>) -> Self {
        let messages = system.map(|system| Message::new("system", system)).into_iter().collect();
        Conversation { rules, raw: false, messages, prompt: Prompt::default(), answer: vec![], asked: None }
    }

    /// A conversation without a template: the model goes on with what was said so far, each turn on a line of its own.
    pub fn raw(rules: &'t Text) -> Self {
        Conversation { raw: true, ..Conversation::new(rules, None) }
    }

    /// What was said.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Adds what the user says. Gives the tokens of the whole conversation, up to where the answer begins.
    ///
    /// # Errors
    /// The template refuses the conversation, or the tokenizer what is said; the conversation is as before.
    pub fn ask(&mut self, said: &str) -> Result<&[u32]> {
        self.take_back();
        self.messages.push(Message::new("user", said));
        match self.next_prompt() {
            Ok(prompt) => Ok(&self.asked.insert(prompt).tokens),
            Err(error) => {
                self.messages.pop();
                Err(error)
            }
        }
    }

    /// Takes back what was asked last, if it has not been answered.
    pub fn take_back(&mut self) {
        if self.asked.take().is_some() {
            self.messages.pop();
        }
    }

    /// Adds the answer to what was asked: the text that was shown of it, and the tokens that were generated, without one that
    /// ended it.
    ///
    /// # Errors
    /// The tokenizer cannot decode the tokens.
    pub fn answer(&mut self, tokens: &[u32], shown: &str) -> Result<()> {
        let Some(prompt) = self.asked.take() else { return Ok(()) };
        self.messages.push(Message::new("assistant", shown));
        // A token that nobody has seen is not part of what was said.
        let seen = tokens.iter().take_while(|&&token| !self.rules.is_special(token)).count();
        let (count, _) = self.spelling(&tokens[..seen], shown)?;
        self.answer = tokens[..count].to_vec();
        self.prompt = prompt;
        Ok(())
    }

    fn next_prompt(&self) -> Result<Prompt> {
        let text = if self.raw { self.plain() } else { self.rules.render(&self.messages, true)? };
        if let Some(rest) = text.strip_prefix(&self.prompt.text).filter(|_| !self.prompt.tokens.is_empty()) {
            let (count, bytes) = self.spelling(&self.answer, rest)?;
            let rest = self.rules.encode_plain(&rest[bytes..])?;
            let tokens = [&self.prompt.tokens, &self.answer[..count], &rest].concat();
            return Ok(Prompt { text, tokens });
        }
        let tokens = if self.raw {
            [self.rules.before(), &self.rules.encode_plain(&text)?].concat()
        } else {
            self.rules.chat(&self.messages)?
        };
        Ok(Prompt { text, tokens })
    }

    /// The messages without a template.
    fn plain(&self) -> String {
        let mut text = String::new();
        for message in &self.messages {
            if message.role == "user" && !text.is_empty() {
                text.push('\n');
            }
            text.push_str(&message.content);
        }
        text
    }

    /// The most tokens whose text a text begins with, and that text's length in bytes.
    fn spelling(&self, tokens: &[u32], text: &str) -> Result<(usize, usize)> {
        let all = self.rules.decode(tokens)?;
        if text.starts_with(&all) {
            return Ok((tokens.len(), all.len()));
        }
        let common = all.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
        // The text of fewer tokens is shorter, but for a character that these leave unfinished.
        let (mut low, mut high) = (0, tokens.len());
        while low < high {
            let middle = (low + high).div_ceil(2);
            if self.rules.decode(&tokens[..middle])?.len() <= common { low = middle } else { high = middle - 1 }
        }
        for count in (1..=low).rev() {
            let part = self.rules.decode(&tokens[..count])?;
            if text.starts_with(&part) {
                return Ok((count, part.len()));
            }
        }
        Ok((0, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{self, bpe};
    use super::*;

    const TEMPLATE: &str = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>\n{% endfor %}\
                            {% if add_generation_prompt %}<s>assistant:{% endif %}";
    /// Writes past answers without their first word and without spaces at their ends.
    const FORGETFUL: &str = "{% for m in messages %}<s>{{ m.role }}:\
                             {{ m.content.split('|')[-1] | trim }}</s>\n{% endfor %}\
                             {% if add_generation_prompt %}<s>assistant:{% endif %}";

    fn rules(template: &str) -> (tempfile::TempDir, Text) {
        fixture::open(&[("chat_template.jinja", template)])
    }

    /// Tokens of parts of text and special tokens.
    fn spelled(parts: &[&str]) -> Vec<u32> {
        let token = |part: &&str| match *part {
            "<s>" => vec![1],
            "</s>" => vec![2],
            text => bpe(text),
        };
        parts.iter().flat_map(token).collect()
    }

    #[test]
    fn generated_tokens_stay_and_only_what_follows_is_tokenised() {
        let (_folder, rules) = rules(TEMPLATE);
        let mut talk = Conversation::new(&rules, Some("be brief"));
        let first =
            spelled(&["<s>", "system:be brief", "</s>", "\n", "<s>", "user:hi", "</s>", "\n", "<s>", "assistant:"]);
        assert_eq!(talk.ask("hi").expect("text"), first);
        talk.answer(&bpe("hello"), "hello").expect("text");
        let next = spelled(&["hello", "</s>", "\n", "<s>", "user:so", "</s>", "\n", "<s>", "assistant:"]);
        assert_eq!(talk.ask("so").expect("text"), [&first[..], &next].concat());
        assert_eq!(talk.messages().len(), 4);
        // An answer that is no text stays as it was generated.
        talk.answer(&[bpe("é")[0], bpe("x")[0]], "\u{FFFD}x").expect("text");
        let second = [&first[..], &next, &[bpe("é")[0], bpe("x")[0], 2]].concat();
        assert!(talk.ask("?").expect("text").starts_with(&second));
    }

    #[test]
    fn what_was_not_shown_is_not_part_of_the_conversation() {
        let (_folder, rules) = rules(TEMPLATE);
        let shown = |tokens: &[u32], shown: &str| {
            let mut talk = Conversation::new(&rules, None);
            let first = talk.ask("hi").expect("text").to_vec();
            talk.answer(tokens, shown).expect("text");
            let all = talk.ask("so").expect("text").to_vec();
            assert!(all.starts_with(&first));
            let end = all.len() - spelled(&["</s>", "\n", "<s>", "user:so", "</s>", "\n", "<s>", "assistant:"]).len();
            all[first.len()..end].to_vec()
        };
        assert_eq!(shown(&bpe("hello STOP"), "hello "), bpe("hello "), "a stop string");
        assert_eq!(shown(&bpe("helloé")[..6], "hello"), bpe("hello"), "an unfinished character");
        assert_eq!(shown(&spelled(&["he", "</s>", "llo"]), "hello"), bpe("hello"), "a special token");
        assert_eq!(shown(&bpe("hello"), ""), [0u32; 0]);
        // What looks like the template's own text is the answer's all the same.
        assert_eq!(shown(&bpe("he</s>"), "he"), bpe("he"));
    }

    #[test]
    fn a_template_that_writes_the_past_differently_takes_over_what_is_the_same() {
        let (_folder, rules) = rules(FORGETFUL);
        let mut talk = Conversation::new(&rules, None);
        let first = talk.ask("hi").expect("text").to_vec();
        talk.answer(&bpe("hello \n"), "hello \n").expect("text");
        let trimmed = spelled(&["hello", "</s>", "\n", "<s>", "user:so", "</s>", "\n", "<s>", "assistant:"]);
        let second = talk.ask("so").expect("text").to_vec();
        assert_eq!(second, [&first[..], &trimmed].concat());
        talk.answer(&bpe("hm|yes"), "hm|yes").expect("text");
        let third = talk.ask("?").expect("text").to_vec();
        assert_eq!(
            third,
            [&second[..], &spelled(&["yes", "</s>", "\n", "<s>", "user:?", "</s>", "\n", "<s>", "assistant:"])]
                .concat()
        );
    }

    #[test]
    fn a_template_that_changes_its_beginning_begins_anew() {
        let (_folder, rules) = rules("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}");
        let mut talk = Conversation::new(&rules, None);
        assert_eq!(talk.ask("a").expect("text"), bpe("1a"));
        talk.answer(&bpe("b"), "b").expect("text");
        assert_eq!(talk.ask("c").expect("text"), bpe("3abc"));
    }

    #[test]
    fn a_question_can_be_taken_back() {
        let (_folder, rules) = rules(
            "{% if messages[-1].content == 'no' %}{{ raise_exception('no') }}{% endif %}\
                                      {% for m in messages %}{{ m.content }};{% endfor %}",
        );
        let mut talk = Conversation::new(&rules, None);
        talk.ask("a").expect("text");
        talk.answer(&bpe("b"), "b").expect("text");
        talk.ask("c").expect("text");
        assert!(talk.ask("no").is_err(), "the template refuses it");
        assert_eq!(talk.messages().len(), 2);
        assert_eq!(talk.ask("d").expect("text"), bpe("a;b;d;"));
        talk.take_back();
        talk.take_back();
        assert_eq!(talk.messages().len(), 2);
    }

    #[test]
    fn without_a_template_text_goes_on() {
        let (_folder, rules) = fixture::open(&[]);
        let mut talk = Conversation::raw(&rules);
        assert_eq!(talk.ask("Once upon").expect("text"), [&[1], &bpe("Once upon")[..]].concat());
        talk.answer(&bpe(" a time"), " a time").expect("text");
        assert_eq!(talk.ask("There").expect("text"), [&[1], &bpe("Once upon a time\nThere")[..]].concat());
        assert!(Conversation::new(&rules, None).ask("hi").is_err(), "no template");
    }
}
