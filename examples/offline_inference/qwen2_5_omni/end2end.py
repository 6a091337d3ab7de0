"""Ask Qwen2.5-Omni about a picture, a sound or a video, read and hear its answer.

python end2end.py --model Qwen/Qwen2.5-Omni-7B "How does a rainbow come about?"
python end2end.py --model ... --image photo.jpg --audio question.wav --speaker Ethan "Answer the question."
python end2end.py --model ... "One word is enough." --modalities text          # no speech is made
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ask import main

if __name__ == "__main__":
    main(__doc__, fps=2)
