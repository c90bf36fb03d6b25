"""How nbgrader makes students' notebooks of the course, and grades them.

`make course` reads it; for a course folder of your own, copy it there.
"""

c = get_config()  # noqa: F821  nbgrader defines it

c.CourseDirectory.course_id = "med-art"
c.ClearSolutions.code_stub = {"python": "# your turn"}
c.ClearSolutions.text_stub = "YOUR ANSWER HERE"
c.Execute.timeout = 300  # seconds a cell may take
