"""Ask Qwen3-Omni about a picture, a sound or a video, read and hear its answer.

python end2end.py --model Qwen/Qwen3-Omni-30B-A3B-Instruct "How does a rainbow come about?"
python end2end.py --model ... --image photo.jpg --audio question.wav --speaker Chelsie "Answer the question."
python end2end.py --model ... "One word is enough." --modalities text          # no speech is made
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ask import main

if __name__ == "__main__":
    main(__doc__, fps=1)
