# The service without torch: CLI and workers (docker-compose.yml).
FROM python:3.12-slim
RUN useradd --create-home tirgen && pip install --no-cache-dir uv
WORKDIR /app
COPY requirements/service.txt requirements/service.txt
RUN uv pip install --system --no-cache --compile-bytecode -r requirements/service.txt
COPY . .
RUN uv pip install --system --no-cache --no-deps .
USER tirgen
ENTRYPOINT ["tirgen"]
