import hashlib

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf_env.text.corpus import film_reviews, review_openings
from rlhf_env.text.tokenizers import word_tokenizer


def sentiment(texts):
    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def test_the_reviews_are_4000_distinct_sentences_and_always_the_same():
    reviews = film_reviews()
    assert len(reviews) == len(set(reviews)) == 4000
    assert all(review.endswith(".") and review == review.strip().lower() for review in reviews)
    # The language model and the reward model that are shipped were trained on exactly this.
    assert (
        hashlib.sha256("\n".join(reviews).encode()).hexdigest()
        == "90a280257205d9985115c76fb12670703524c0cb5dc67174bd9ebf04603602e2"
    )


def test_a_caller_cannot_change_the_corpus():
    film_reviews().clear()
    assert len(film_reviews()) == 4000


def test_the_language_is_small_enough_for_a_tiny_model():
    reviews = film_reviews()
    tokenizer = word_tokenizer(reviews)
    assert len(tokenizer) < 250
    lengths = [len(tokenizer.encode(review)) for review in reviews]
    assert 5 <= min(lengths) and max(lengths) <= 20


def test_sentiment_is_centred_and_widely_spread():
    scores = sentiment(film_reviews())
    mean = sum(scores) / len(scores)
    assert abs(mean) < 0.1
    assert sum((s - mean) ** 2 for s in scores) / len(scores) > 0.4**2
    assert sum(s > 0.3 for s in scores) > 1000
    assert sum(s < -0.3 for s in scores) > 1000


def test_openings_are_neutral_and_begin_reviews():
    openings, reviews = review_openings(), film_reviews()
    assert len(openings) == len(set(openings)) == 79
    assert set(sentiment(openings)) == {0.0}
    for opening in openings:
        assert sum(review.startswith(opening + " ") for review in reviews) >= 5, opening


def test_articles_fit_the_words_after_them():
    for review in film_reviews():
        words = review.split()
        for article, word in zip(words, words[1:], strict=False):
            if article == "a":
                assert word[0] not in "aeiou" and not word.startswith(("honest", "hour")), review
            if article == "an":
                assert word[0] in "aeiou" or word.startswith(("honest", "hour")), review
