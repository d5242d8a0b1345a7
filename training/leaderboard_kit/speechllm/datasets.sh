# The public English sets of the leaderboard in September 2026, one a line: repository, configuration, split and batch
# size for a GPU with 140 GB. A set in a repository of its own has no configuration (-).
DATASETS=(
    "hf-audio/open-asr-leaderboard ami_cleaned test 256"
    "ArtificialAnalysis/Earnings22-Cleaned-AA-chunked - test 256"
    "hf-audio/open-asr-leaderboard gigaspeech_cleaned test 256"
    "hf-audio/open-asr-leaderboard librispeech test.clean 256"
    "hf-audio/open-asr-leaderboard librispeech test.other 256"
    "hf-audio/open-asr-leaderboard spgispeech test 256"
    "VoiceArena/Monsoon_en_IN_test - test 256"
    "hf-audio/open-asr-leaderboard voxpopuli_cleaned_aa test 256"
)
