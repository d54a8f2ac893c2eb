//! The demo's work: people chat with assistants that begin with long, shared instructions.
//!
//! Made up from a seed, so that every policy gets the same conversations, turn by turn.

/// Assistants; each has instructions of its own.
const ASSISTANTS: u64 = 10;
/// Bytes (for the mock's tokenizer: tokens) of an assistant's instructions, shortest and longest.
const INSTRUCTIONS: (u64, u64) = (3_000, 7_500);
/// People; each has one conversation.
const PEOPLE: u64 = 44;
/// What a person writes in a turn, shortest and longest.
const QUESTION: (u64, u64) = (150, 700);
/// Of a hundred people, those who begin with a document of their own; and how long it is.
const WITH_DOCUMENT: u64 = 30;
const DOCUMENT: (u64, u64) = (6_000, 12_000);
/// Turns of a conversation, fewest and most.
const TURNS: (u64, u64) = (3, 6);
/// Milliseconds within which everybody comes.
const COME_WITHIN: u64 = 5_000;
/// Milliseconds that a person takes between an answer and the next question, shortest and longest.
const PAUSE: (u64, u64) = (200, 1_000);

/// One person's conversation.
pub(super) struct Conversation {
    /// The assistant's instructions.
    pub(super) instructions: String,
    /// What the person writes, turn by turn.
    pub(super) questions: Vec<String>,
    /// Milliseconds after the start at which the person comes.
    pub(super) comes_after_ms: u64,
    /// Milliseconds that the person takes to read an answer and write on, turn by turn.
    pub(super) pauses_ms: Vec<u64>,
}

/// All conversations.
pub(super) fn conversations() -> Vec<Conversation> {
    let mut dice = Dice(20);
    let assistants: Vec<String> = (0..ASSISTANTS)
        .map(|i| text(&mut dice, &format!("You are assistant number {i}. "), INSTRUCTIONS))
        .collect();
    (0..PEOPLE)
        .map(|person| {
            let turns = dice.between(TURNS);
            Conversation {
                instructions: assistants[dice.between((0, ASSISTANTS - 1)) as usize].clone(),
                questions: (0..turns)
                    .map(|turn| {
                        let document = turn == 0 && dice.between((0, 99)) < WITH_DOCUMENT;
                        let length = if document { DOCUMENT } else { QUESTION };
                        text(&mut dice, &format!("Person {person} asks, in turn {turn}: "), length)
                    })
                    .collect(),
                comes_after_ms: dice.between((0, COME_WITHIN)),
                pauses_ms: (0..turns).map(|_| dice.between(PAUSE)).collect(),
            }
        })
        .collect()
}

const WORDS: [&str; 16] = [
    "please", "explain", "how", "the", "cache", "of", "an", "engine", "keeps", "what", "it", "computed",
    "for", "a", "prompt", "before",
];

fn text(dice: &mut Dice, beginning: &str, length: (u64, u64)) -> String {
    let length = dice.between(length) as usize;
    let mut text = beginning.to_owned();
    while text.len() < length {
        text.push_str(WORDS[dice.between((0, WORDS.len() as u64 - 1)) as usize]);
        text.push(' ');
    }
    text
}

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn between(&mut self, (least, most): (u64, u64)) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        least + (z ^ (z >> 31)) % (most - least + 1)
    }
}
