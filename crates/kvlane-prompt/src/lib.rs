//! OpenAI requests to exactly the tokens that the engine sees.
